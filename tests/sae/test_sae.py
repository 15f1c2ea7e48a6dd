"""Sparse autoencoders: what they reconstruct, SAELens's files, training on a store, and the baseline of `evaluate`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentprior.cli.commands import USAGE, main
from latentprior.config import SAEConfig
from latentprior.data.activations import ActivationBatch
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.sae import training as sae_training
from latentprior.sae.sae import SAE, active_share, explained_variance
from latentprior.sae.saelens import load_saelens
from latentprior.sae.training import prepare_sae, train_sae
from latentprior.utils.errors import InputError

WIDTH, LATENTS = 8, 24
POINT = Hookpoint("tiny", 1, WIDTH)


def random_parts(seed: int = 0) -> dict[str, torch.Tensor]:
    """SAELens's tensors, the decoder's rows of different norms."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "W_enc": draw(WIDTH, LATENTS),
        "b_enc": draw(LATENTS),
        "W_dec": draw(LATENTS, WIDTH) * torch.linspace(0.2, 3, LATENTS)[:, None],
        "b_dec": draw(WIDTH),
    }


def dense(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """Latent values as one [N, latents]."""
    indices, values = sae.encode(x)
    return torch.zeros(len(x), sae.latents).scatter_add(1, indices, values)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(9)) * 2


# -- SAELens -------------------------------------------------------------------------------------------------------


def write_saelens(folder: Path, parts: dict[str, torch.Tensor], **cfg) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in parts.items()}, folder / "sae_weights.safetensors")
    metadata = {"model_name": "org/tiny", "hook_name": "blocks.3.hook_resid_post"}
    values = {"d_in": WIDTH, "d_sae": LATENTS, "normalize_activations": "none", "metadata": metadata, **cfg}
    (folder / "cfg.json").write_text(json.dumps(values))
    return folder


def by_the_book(parts: dict[str, torch.Tensor], x: torch.Tensor, architecture: str, *, subtract: bool, k: int = 5):
    """SAELens's definition of latents and reconstruction, written down plainly."""
    pre = (x - parts["b_dec"] * subtract) @ parts["W_enc"] + parts["b_enc"]
    if architecture == "standard":
        acts = pre.relu()
    elif architecture == "jumprelu":
        acts = pre.relu() * (pre > parts["threshold"])
    else:
        kth = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
        acts = torch.where(pre >= kth, pre, 0).relu()
    return acts, acts @ parts["W_dec"] + parts["b_dec"]


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_saelens_saes_say_what_saelens_says(tmp_path, x, architecture, subtract):
    parts = random_parts()
    cfg = {"architecture": architecture, "apply_b_dec_to_input": subtract}
    if architecture == "jumprelu":
        parts["threshold"] = torch.rand(LATENTS, generator=torch.Generator().manual_seed(1)) * 3
    if architecture == "topk":
        cfg["k"] = 5
    sae = load_saelens(write_saelens(tmp_path, parts, **cfg))
    acts, reconstruction = by_the_book(parts, x, architecture, subtract=subtract)
    norm = parts["W_dec"].norm(dim=1)
    assert torch.allclose(dense(sae, x), acts * norm, atol=1e-4)
    assert torch.allclose(sae.reconstruct(x), reconstruction, atol=1e-4)
    assert torch.allclose(sae.decoder.norm(dim=1), torch.ones(LATENTS))
    assert sae.hookpoint == Hookpoint("org/tiny", 3, WIDTH)
    values = sae.encode(x)[1]
    assert (values[:, :-1].sum() > 0) and len(values) == len(x)


def test_saelens_topk_by_decoder_norm(tmp_path, x):
    parts = random_parts()
    sae = load_saelens(write_saelens(tmp_path, parts, architecture="topk", k=5, rescale_acts_by_decoder_norm=True))
    norm = parts["W_dec"].norm(dim=1)
    pre = ((x - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]) * norm
    kept = torch.zeros_like(pre).scatter(1, *[t for t in reversed(pre.topk(5))][:1], pre.topk(5).values).relu()
    assert torch.allclose(sae.reconstruct(x), (kept / norm) @ parts["W_dec"] + parts["b_dec"], atol=1e-4)


def test_saelens_configurations_from_before_version_6(tmp_path, x):
    parts = random_parts()
    folder = write_saelens(tmp_path, parts)
    old = {"hook_point": "blocks.7.hook_resid_pre", "model_name": "gpt2-small", "d_in": WIDTH}
    (folder / "cfg.json").write_text(json.dumps(old | {"normalize_activations": False}))
    sae = load_saelens(tmp_path.parent, tmp_path.name, model="gpt2")
    assert sae.hookpoint == Hookpoint("gpt2", 7, WIDTH, side="input") and sae.k is None
    assert torch.allclose(sae.reconstruct(x), by_the_book(parts, x, "standard", subtract=True)[1], atol=1e-4)
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "hook_name": "model.layers.7"}
    (folder / "cfg.json").write_text(json.dumps(old | topk))
    sae = load_saelens(folder)
    assert (sae.k, sae.hookpoint.layer, sae.hookpoint.side) == (5, 7, "output")


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ({"architecture": "gated"}, "unknown architecture of an SAE 'gated'"),
        ({"architecture": "topk"}, "holds no whole SAE"),
        ({"architecture": "topk", "k": 99}, "k must lie between 1 and the number of latents, 24, got 99"),
        ({"normalize_activations": "layer_norm"}, "normalised by 'layer_norm'"),
        ({"metadata": {"hook_name": "blocks.3.attn.hook_z"}}, "'blocks.3.attn.hook_z', not of the input or output"),
        ({"architecture": "jumprelu"}, "holds no whole SAE"),
    ],
)
def test_saelens_saes_that_cannot_be_read_are_named(tmp_path, cfg, expected):
    with pytest.raises(InputError, match=re.escape(expected)):
        load_saelens(write_saelens(tmp_path, random_parts(), **cfg))


def test_missing_and_damaged_saelens_folders(tmp_path):
    with pytest.raises(InputError, match="cfg.json is missing"):
        load_saelens(tmp_path)
    with pytest.raises(InputError, match="no SAE at 'no/where'"):
        load_saelens("no/where", "x")
    folder = write_saelens(tmp_path / "sae", random_parts(), architecture="standard")
    (folder / "sae_weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="damaged"):
        load_saelens(folder)


# -- SAE -----------------------------------------------------------------------------------------------------------


def topk_sae(k: int = 3) -> SAE:
    parts = random_parts()
    return SAE.of(parts["W_enc"].T, parts["b_enc"], parts["W_dec"], parts["b_dec"], POINT, k=k, provenance={"n": 1})


def test_files_give_back_the_same_sae(tmp_path, x):
    threshold = torch.rand(LATENTS)
    topk = topk_sae()
    for sae in (topk, replace(topk, k=None, threshold=threshold)):
        again = SAE.load(sae.save(tmp_path))
        assert torch.equal(again.reconstruct(x), sae.reconstruct(x))
        assert (again.k, again.hookpoint, again.provenance) == (sae.k, sae.hookpoint, sae.provenance)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae.json", "sae.safetensors"]


@pytest.mark.parametrize("lost", ["encoder", "scale", "sae.safetensors", "hookpoint", "half"])
def test_damaged_files_are_refused(tmp_path, lost):
    topk_sae().save(tmp_path)
    weights, described = tmp_path / "sae.safetensors", tmp_path / "sae.json"
    if lost in ("encoder", "scale"):
        tensors = load_file(weights)
        del tensors[lost]
        save_file(tensors, weights)
    elif lost == "sae.safetensors":
        weights.unlink()
    elif lost == "hookpoint":
        described.write_text(json.dumps({"k": 3, "provenance": {}}))
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="missing or damaged|holds no whole SAE"):
        SAE.load(tmp_path)


def test_wrong_shapes_and_numbers_are_refused():
    parts = random_parts()
    tensors = [parts["W_enc"].T, parts["b_enc"], parts["W_dec"], parts["b_dec"]]
    with pytest.raises(InputError, match="do not fit together"):
        SAE.of(*tensors[:2], parts["W_dec"].T, tensors[3], POINT, k=3)
    with pytest.raises(InputError, match="NaN or infinite"):
        SAE.of(*tensors[:3], torch.full((WIDTH,), torch.nan), POINT, k=3)
    with pytest.raises(InputError, match="8.* 9"):
        SAE.of(*tensors, replace(POINT, width=9), k=3)
    with pytest.raises(InputError, match="either k"):
        SAE.of(*tensors, POINT)
    with pytest.raises(InputError, match="8, got 9"):
        topk_sae().encode(torch.zeros(2, 9))


def test_no_rows_and_no_active_latents(x):
    assert topk_sae().reconstruct(x[:0]).shape == (0, WIDTH)
    silent = replace(topk_sae(), k=None, threshold=torch.full((LATENTS,), 1e9))
    assert silent.encode(x)[0].shape == (len(x), 0)
    assert torch.equal(silent.reconstruct(x), silent.offset.expand(len(x), WIDTH))
    assert active_share(silent, x) == 0.0


def test_chunks_change_nothing(x, monkeypatch):
    sae = replace(topk_sae(), k=None, threshold=torch.linspace(0, 8, LATENTS))
    whole = dense(sae, x), sae.reconstruct(x)
    monkeypatch.setattr("latentprior.sae.sae.CHUNK", 7)
    assert torch.allclose(dense(sae, x), whole[0], atol=1e-5)
    assert torch.allclose(sae.reconstruct(x), whole[1], atol=1e-5)


# -- training ------------------------------------------------------------------------------------------------------


def sparse_rows(count: int, seed: int, atoms: int = 12) -> torch.Tensor:
    """Sums of two of a few directions, far from the origin and in large units."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(atoms, WIDTH, generator=torch.Generator().manual_seed(5)), dim=1
    )
    which = torch.rand(count, atoms, generator=generator).topk(2, dim=1).indices
    size = 1 + torch.rand(count, 2, 1, generator=generator)
    return 40 * (directions[which] * size).sum(dim=1) + 100


def write_store(folder: Path, layers: tuple[int, ...] = (1,), count: int = 2000) -> ActivationStore:
    index = torch.arange(count)
    with StoreWriter(folder, [Hookpoint("tiny", n, WIDTH) for n in layers], dtype="float32", source={}) as writer:
        for step, n in enumerate(layers, start=1):
            rows = sparse_rows(count, n) if n == 1 else torch.randn(count, WIDTH)
            batch = ActivationBatch(rows, torch.full((count,), n), index // 10, 1 + index % 10, index % 50)
            writer.append(batch, next_batch=step, left_out={})
    return ActivationStore(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return write_store(tmp_path_factory.mktemp("sae") / "store")


CONFIG = SAEConfig(expansion=4, k=2, activations=100_000, learning_rate=1e-2)


@pytest.fixture(scope="module")
def trained(store) -> SAE:
    return train_sae(store, CONFIG, 1)


def test_training_finds_the_sparse_structure(trained):
    fresh = sparse_rows(1000, seed=77)
    found = explained_variance(trained, fresh)
    # Two principal components explain 0.56 of it.
    centred = fresh - fresh.mean(0)
    variances = torch.linalg.eigvalsh(centred.T @ centred)
    assert found > 0.25 + float(variances[-2:].sum() / variances.sum())
    assert active_share(trained, fresh) > 0.3
    assert trained.latents == 4 * WIDTH and trained.encode(fresh)[0].shape == (1000, 2)
    assert trained.hookpoint == POINT
    assert trained.provenance["activations_seen"] == 100_000 and trained.provenance["settings"]["k"] == 2


def test_training_repeats_itself_and_leaves_the_global_generator(store):
    config = replace(CONFIG, activations=4096)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    seen: list[int] = []
    first = train_sae(store, config, 1, report=lambda done, total, figures: seen.append(done))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(train_sae(store, config, 1).decoder, first.decoder)
    assert not torch.equal(train_sae(store, replace(config, seed=1), 1).decoder, first.decoder)
    assert seen == sorted(seen) and seen[-1] == 4096


def test_training_takes_the_rows_of_one_layer(tmp_path):
    several = write_store(tmp_path / "several", (0, 1))
    sae = train_sae(several, CONFIG, 1)
    assert sae.hookpoint.layer == 1 and sae.provenance["activations_seen"] == 100_000
    assert explained_variance(sae, sparse_rows(1000, seed=77)) > 0.8
    with pytest.raises(InputError, match="unknown layer '2'"):
        train_sae(several, CONFIG, 2)


@pytest.mark.parametrize(("most", "seen"), [(10**6, 5), (1500, None)])
def test_by_default_it_trains_as_long_as_its_rows_deserve(tmp_path, monkeypatch, most, seen):
    monkeypatch.setattr(sae_training, "MOST", most)
    several = write_store(tmp_path / "several", (0, 1))
    expected = seen * len(several.rows_at([1])) if seen else most
    totals: list[int | None] = []
    config = replace(CONFIG, activations=None)
    sae = prepare_sae(
        config, tmp_path / "sae", str(several.folder), POINT, report=lambda done, total, _: totals.append(total)
    )
    assert set(totals) == {expected} and sae.provenance["activations_seen"] == expected
    # One that is there already is taken, however long it was trained, unless a number is asked for.
    assert prepare_sae(config, tmp_path / "sae", None, POINT).k == 2
    with pytest.raises(InputError, match=f"of activations {expected}, not 77"):
        prepare_sae(replace(CONFIG, activations=77), tmp_path / "sae", None, POINT)


def test_training_without_the_extra_says_what_to_install(store, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sparsify", None)
    with pytest.raises(InputError, match=r'pip install "latentprior\[sae\]"'):
        train_sae(store, CONFIG, 1)


def test_training_on_a_cpu_does_without_triton(store, monkeypatch):
    """sparsify decodes with a GPU kernel wherever Triton is installed, as beside every CUDA build of torch."""

    def kernel(*_):
        raise AssertionError("a GPU kernel on a CPU")

    train_sae(store, replace(CONFIG, activations=1024), 1)  # imports sparsify
    monkeypatch.setattr("sparsify.sparse_coder.decoder_impl", kernel)
    train_sae(store, replace(CONFIG, activations=1024), 1)


def test_training_prints_nothing(store, capfd):
    train_sae(store, replace(CONFIG, activations=2048), 1)
    assert capfd.readouterr() == ("", "")


def test_more_active_latents_than_there_are(store):
    with pytest.raises(InputError, match="k is 50.* 32"):
        train_sae(store, replace(CONFIG, k=50), 1)


def test_an_sae_is_trained_once(store, tmp_path, monkeypatch):
    config = replace(CONFIG, activations=2048)
    made = prepare_sae(config, tmp_path / "sae", str(store.folder), POINT)

    def again(*_, **__):
        raise AssertionError("trained twice")

    monkeypatch.setattr(sae_training, "train_sae", again)
    found = prepare_sae(config, tmp_path / "sae", None, POINT)
    assert torch.equal(found.decoder, made.decoder)
    with pytest.raises(InputError, match=r"k 2, not 3.*--sae\.k 2.*--sae\.path"):
        prepare_sae(replace(config, k=3), tmp_path / "sae", None, POINT)
    with pytest.raises(InputError, match="tiny layer 1 .* tiny layer 2"):
        prepare_sae(config, tmp_path / "sae", None, replace(POINT, layer=2))
    with pytest.raises(InputError, match="tiny layer 1 .* other layer 1"):
        prepare_sae(config, tmp_path / "sae", None, replace(POINT, model="other"))
    with pytest.raises(InputError, match="store .*tiny layer 1 .* other"):
        prepare_sae(config, tmp_path / "new", str(store.folder), replace(POINT, model="other"))
    assert prepare_sae(config, tmp_path / "sae", None, replace(POINT, model="some/where/tiny")).k == 2
    with pytest.raises(InputError, match="--train"):
        prepare_sae(config, tmp_path / "none", None, POINT)


def test_an_sae_of_saelens_serves_as_it_is(tmp_path):
    folder = write_saelens(tmp_path, random_parts(), architecture="standard")
    sae = prepare_sae(CONFIG, folder, None, Hookpoint("tiny", 3, WIDTH))
    assert sae.threshold is not None and sae.provenance["format"] == "SAELens"


# -- the baseline of `latentprior evaluate` ------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluate_compares_the_prior_with_an_sae(tmp_path, llm_folder, write_texts, tiny_glp, monkeypatch, capsys):
    texts, llm = write_texts(tmp_path / "texts.jsonl", 60), ["--llm.model", llm_folder]
    record = ["record", "--layers", "1", *llm, "--text.dataset", texts, "--text.heldout", "0.4"]
    for part in ("train", "heldout"):
        assert main([*record, "--output", str(tmp_path / part), "--text.part", part]) == 0
    store = ActivationStore(tmp_path / "train")
    glp = tiny_glp(store.width, (1,), store.hookpoints[0].model)
    glp.save_pretrained(tmp_path / "prior")
    command = ["evaluate", "--prior", str(tmp_path / "prior"), "--heldout", str(tmp_path / "heldout"), "--train",
               str(tmp_path / "train"), "--output", str(tmp_path / "out"), "--samples", "100", "--nfes", "2",
               "--solvers", "euler", "--projections", "8", *llm, "--text.dataset", texts, "--text.heldout", "0.4",
               "--text.limit", "4", "--steps", "2", "--baseline", "sae", "--sae.expansion", "2", "--sae.k", "4",
               "--sae.activations", "20000"]  # fmt: skip
    assert main(command) == 0
    result = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    rows = {row["source"]: row for row in result["distribution"]}
    assert list(rows) == ["real", "gaussian-full", "gaussian-diagonal", "sae", "prior"]
    assert (rows["sae"]["latents"], rows["sae"]["k"]) == (2 * store.width, 4)
    assert rows["real"]["frechet"]["total"] < rows["sae"]["frechet"]["total"] < rows["prior"]["frechet"]["total"]
    delta = {row["method"]: row["delta"] for row in result["delta_lm"]["rows"]}
    assert abs(delta["sae"]) < abs(delta["noise"])
    assert 0.2 < result["sae"]["explained_variance"] < 1 and result["sae"]["hookpoint"]["layer"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "SAE reconstructions" in page and "SAE reconstruction</" in page
    kept = SAE.load(tmp_path / "out" / "sae")
    assert kept.hookpoint == store.hookpoints[0] and kept.provenance["settings"]["expansion"] == 2

    monkeypatch.setattr(sae_training, "train_sae", None)  # a second run does without
    assert main(command) == 0
    again = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert again["distribution"] == result["distribution"] and again["delta_lm"] == result["delta_lm"]
    capsys.readouterr()
    assert main([*command, "--sae.k", "5"]) == USAGE
    assert "an SAE of k 4, not 5" in capsys.readouterr().err
    assert main([*command, "--baseline", "lda"]) == USAGE
    assert "lda" in capsys.readouterr().err
