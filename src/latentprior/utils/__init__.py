"""What any package could use and nothing of the field.

Errors that a user can mend, the one atomic write (`files`), locks of folders, seeds, the comparison of settings,
devices and chips, processes of one run, progress, what a result was made with, and the Hugging Face Hub.
"""
