"""What any package could use and nothing of the field: errors, files, locks, seeds, ranks, devices, progress."""
