"""Promise: what a run learnt answers other images as it answered its own, and nothing is faked.

A new client gets what one that was never drawn has; what would need images asks for them.
"""

import dataclasses
import functools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers import BACKBONE, DATA, PARAMS, refuses, store_clip
from helpers.runs import equal, near, small
from PIL import Image

from fpl import cli
from fpl.data import encoders, features
from fpl.data.manifest import read_manifest
from fpl.experiments import assemble, keep, predict, runner
from fpl.experiments.metrics import NO_CLASS
from fpl.experiments.runner import Asked
from fpl.experiments.settings import ROWS

pytestmark = pytest.mark.usefixtures("patched", "alone")

KEPT = Path("kept.safetensors")
NEVER = 1  # the client that is not drawn
# of a new client: without images, and those whose own part is as it was drawn
OWN_IMAGES = {"pfedprompt", "zeroshot_memory", "majority", "zeroshot_own", "ridge_own"}
NOTHING_TRAINED = {"coop", "fedamp", "fedpha", "untrained", "gate_alone", "coop_adapter"}
PARTLY = {"fedper", "fedotp", "fedpgp", "own_gate", "fedotp_released", "fedpgp_released"}
PARTLY |= {"promptfolio", "fedsept", "dpfpl", "fedpgp_two", "fedpgp_placeholder"}
EVERYBODY = "ridge_all"


@functools.cache
def clip():
    return encoders.load(BACKBONE.name)


@functools.cache
def learn(row, **changes):
    """Make a run, in which client 1 is never drawn and others come back.

    Returns its last round, its setup, and the model that is restored from a file.
    """
    experiment = small(row, **{"rounds": 3, "participation": 0.5, "lr": 0.05, **changes})
    setup = assemble.setup_of(experiment)
    *_, last = assemble.rounds_of(experiment, setup)
    about = {"images": DATA.name, "backbone": dataclasses.asdict(BACKBONE)}
    keep.write(KEPT, keep.of_run(setup, last, clip(), **about))
    return last, setup, predict.restore(KEPT, clip())


@pytest.fixture
def images(here):
    """The paths of all images, in the order of their features."""
    manifest = read_manifest(DATA.folder / "manifest.csv")
    return [manifest.folder / row["path"] for row in manifest.rows]


def sorted_by_class(index, images, folder):
    """Copy images to folders CLASS/FILE, and return the folder."""
    labels = features.load(DATA.features).labels
    classes = features.load(DATA.features).classes
    shutil.rmtree(folder, ignore_errors=True)
    for i in index.tolist():
        place = Path(folder) / classes[labels[i]].replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(images[i], place)
    return folder


# Clients of the run


@pytest.mark.parametrize("row", ROWS)
def test_test_images_are_answered_as_in_the_run(row, images):
    last, setup, model = learn(row)
    names = [*setup.text.names, *[NO_CLASS] * len(setup.text.names)]
    for client, answers in enumerate(last.answers):
        asked = [images[i] for i in setup.clients.test[client]]
        found = model.predict(asked, client)
        assert found["image"].tolist() == [*map(str, asked)] and not found["error"].any()
        assert found["class"].tolist() == [names[i] for i in answers.predicted]
        wanted = answers.confidence.tolist()
        assert found["probability"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_ranks_are_those_of_the_softmax_by_hand(images):
    last, setup, model = learn("promptfl")
    feats = features.load(DATA.features).feats[:5]
    t = setup.text(last.evaluated["ctx"][2])
    shares = np.exp(np.float64(setup.text.scale) * (feats @ t.T).double().numpy())
    shares /= shares.sum(1, keepdims=True)
    found = model.predict(images[:5], 2, top=3)
    assert [*found["rank"]] == [1, 2, 3] * 5
    for i, lines in enumerate(np.split(np.arange(15), 5)):
        order = (-shares[i]).argsort()[:3]
        assert found["class"][lines].tolist() == [setup.text.names[c] for c in order]
        assert found["probability"][lines].tolist() == pytest.approx(shares[i][order], rel=1e-4)
    everything = model.predict(images[0], 2, top=1000)
    assert len(everything) == 30 and everything["probability"].sum() == pytest.approx(1)


def test_a_client_has_a_name_or_a_number(images):
    _, _, model = learn("coop")
    named = dataclasses.replace(model.kept, clients=["ann", "bob", "3", "dan"])
    both = dataclasses.replace(model, kept=named)
    for name, number in {"ann": 0, "dan": 3, "3": 2, "1": 1, "0": 0}.items():
        assert both.predict(images[:3], name).equals(model.predict(images[:3], number))
    assert both.predict(images[:3], 3).equals(model.predict(images[:3], "3"))
    refuses(lambda: both.predict(images, "bo"), ["'bo'", "did you mean 'bob'?", "0 to 3"])


def test_evaluation_counts_as_by_hand(images):
    last, setup, model = learn("promptfl", lr=0.5)
    index = torch.cat([setup.clients.test[1], setup.clients.train[1]])
    found = model.evaluate(sorted_by_class(index, images, "labelled"), 1)
    x, truth = setup.clients.feats[index], setup.clients.labels[index].tolist()
    said = (x @ setup.text(last.evaluated["ctx"][1]).T).argmax(-1).tolist()
    counts = np.zeros((30, 30), int)
    f1 = []
    for true, taken in zip(truth, said):
        counts[true, taken] += 1
    for c in {*truth}:
        f1.append(2 * counts[c, c] / (counts[c].sum() + counts[:, c].sum()))
    assert found.accuracy == pytest.approx(counts.trace() / len(truth)) and 0 < found.accuracy < 1
    assert found.macro_f1 == pytest.approx(np.mean(f1))
    assert (found.confusion.to_numpy() == counts).all()
    assert [*found.confusion.index] == [*found.confusion.columns] == setup.text.names


# Images


def test_images_may_be_named_in_many_ways(images, tmp_path):
    *_, model = learn("coop")
    folder = tmp_path / "holiday"
    (folder / "beach" / ".thumbs").mkdir(parents=True)
    copies = [folder / "a.png", folder / "b[1].png", folder / "beach" / "c.PNG"]
    for image, copy in zip(images, copies):
        shutil.copy(image, copy)
    shutil.copy(images[3], folder / "beach" / ".thumbs" / "d.png")
    wanted = model.predict(images[:3])[["class", "probability"]]

    def same(given, n=3):
        found = model.predict(given)[["class", "probability"]]
        return np.allclose(found["probability"], wanted["probability"][:n]) and (
            found["class"].tolist() == wanted["class"].tolist()[:n]
        )

    assert same(folder) and same(str(folder)) and same([folder]) and same(iter(copies))
    assert same(f"{folder}/**/*.[pP]*") and same([f"{folder}/*.png", folder / "beach"])
    assert same(copies[0], 1) and same([str(copies[0])], 1)
    opened = [Image.open(copy) for copy in copies]
    assert same(opened) and same([copies[0], *opened[1:]]) and same(opened[0], 1)
    assert model.predict(opened)["image"].tolist() == [*map(str, copies)]
    assert model.predict(opened[0].convert("RGB"))["image"].tolist() == ["image 0"]
    (folder / "notes.txt").write_text("rain")
    with pytest.warns(UserWarning, match="1 files not called as pictures are.*notes.txt"):
        assert same(folder)


def test_own_photographs_are_turned_and_those_of_other_data_are_not(images, tmp_path):
    *_, model = learn("coop")
    upright = Image.open(images[0]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    stored, tagged = upright.transpose(Image.Transpose.ROTATE_90), tmp_path / "tagged.png"
    stored.save(tagged, exif=exif)
    about = {**model.kept.about, "images": "own"}
    own = dataclasses.replace(model, kept=dataclasses.replace(model.kept, about=about))
    for one, wanted in ((own, upright), (model, stored)):
        x, _ = one.encode([tagged, Image.open(tagged), wanted], "feats")
        assert torch.equal(x[0], x[2]) and torch.equal(x[1], x[2])
    assert not torch.equal(own.encode([tagged], "feats")[0], model.encode([tagged], "feats")[0])


def test_features_are_those_of_the_file(images):
    *_, model = learn("fedotp")
    for content in ("feats", "patches"):
        path = DATA.file(content)
        x, _ = model.encode(images, content)
        assert torch.equal(x, features.load(path, content=content).feats)


def test_what_cannot_be_read_is_said_and_the_rest_is_answered(images, tmp_path):
    *_, model = learn("coop")
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[1].read_bytes()[:-200])
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    floats = Image.new("CMYK", (8, 8))
    given = [broken, images[0], text, tmp_path / "gone.png", images[2], floats]
    found = model.predict(given, top=2)
    assert found["image"].tolist().count(str(images[0])) == 2 and len(found) == 8
    bad = found[found["error"] != ""]
    assert bad["class"].isna().all() and bad["rank"].isna().all() and len(bad) == 4
    words = ["truncated", "no picture in a format", "No such file", "cannot write mode CMYK"]
    assert all(word in why for word, why in zip(words, bad["error"]))
    alone = model.predict([images[0], images[2]], top=2)
    assert found[found["error"] == ""].reset_index(drop=True).equals(alone)
    assert len(model.predict([text, broken])) == 2
    folder = tmp_path / "labelled" / model.kept.classes[0]
    folder.mkdir(parents=True)
    shutil.copy(text, folder)
    for use in (model.evaluate, model.adapt):
        with pytest.raises(OSError, match="1 of 1 images cannot be read: .*text.jpg"):
            use(tmp_path / "labelled")


# New clients


@pytest.mark.parametrize("row", [row for row in ROWS if row not in {EVERYBODY, *OWN_IMAGES}])
def test_a_new_client_has_what_one_that_was_never_drawn_has(row, images):
    tuned = {"tune_epochs": 0} if row == "finetuned" else {}
    _, _, model = learn(row, **tuned)
    if row in NOTHING_TRAINED:
        words = ["nothing that was trained", "--adapt FOLDER"]
        refuses(lambda: model.predict(images, "new"), words)
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = model.classifier("new")
    assert len(told) == (row in PARTLY)
    x, _ = model.encode(images[:8], model.kept.method.inputs)
    assert torch.allclose(found.logits(x), model.classifier(NEVER).logits(x), atol=1e-5)


@pytest.mark.parametrize("row", sorted(OWN_IMAGES))
def test_with_the_images_of_a_client_a_new_one_is_that_client(row, images):
    """lr 0 leaves pFedPrompt's prompt as the server sent it."""
    _, setup, model = learn(row, lr=0)
    refuses(lambda: model.predict(images, "new"), ["images of the client", "--adapt FOLDER"])
    for client in (0, 3):
        mine = sorted_by_class(setup.clients.train[client], images, "mine")
        x, _ = model.encode(images, "feats")
        found = model.adapt(mine).classifier("new").logits(x)
        torch.testing.assert_close(found, model.classifier(client).logits(x), atol=1e-4, rtol=0)


def test_who_needs_the_images_of_all_has_no_new_client(images):
    _, setup, model = learn(EVERYBODY)
    mine = sorted_by_class(setup.clients.train[0], images, "mine")
    for use in (lambda: model.predict(images, "new"), lambda: model.adapt(mine)):
        refuses(use, ["images of all clients", "take another row"])


def test_who_adds_up_what_all_say_is_not_adapted(images):
    """AFL's classifier is sent without the sums to which a new client's would be added."""
    _, setup, model = learn("afl")
    mine = sorted_by_class(setup.clients.train[0], images, "mine")
    refuses(lambda: model.adapt(mine), ["AFL", "run it again with the new one"])


def test_a_client_called_new_is_not_mistaken_for_one_that_is(images):
    _, setup, model = learn("promptfl")
    mine = sorted_by_class(setup.clients.train[0], images, "mine")
    names = ["new", *map(str, range(1, model.kept.n))]
    named = dataclasses.replace(model, kept=dataclasses.replace(model.kept, clients=names))
    refuses(lambda: named.adapt(mine), ["a client called new", "another name"])


def test_adapting_begins_at_the_full_rate(images):
    """The released schedule begins with 1e-5, in the first epoch of the first client of all."""
    _, setup, model = learn("promptfl_released", rounds=1)
    mine = sorted_by_class(setup.clients.train[0], images, "mine")
    plain = dataclasses.replace(
        model.kept, training=dataclasses.replace(model.kept.training, schedule="constant")
    )
    constant = dataclasses.replace(model, kept=plain).adapt(mine, epochs=1)
    assert near(model.adapt(mine, epochs=1).new.p, constant.new.p)


def test_adapting_is_what_fine_tuning_does(images):
    """With all images in one batch their order plays no part."""
    how = {"rounds": 2, "batch_size": 100, "lr": 0.1}
    last, setup, _ = learn("finetuned", tune_epochs=3, **how)
    _, _, model = learn("promptfl", **how)
    mine = sorted_by_class(setup.clients.train[2], images, "mine")
    adapted = model.adapt(mine, epochs=3)
    wanted = {name: value[2:3] for name, value in last.evaluated.items()}
    assert near(adapted.new.p, wanted)
    assert not near(model.adapt(mine, epochs=2).new.p, wanted)
    assert not near(model.classifier("new").p, wanted)
    assert model.new is None


@pytest.mark.parametrize("row", [row for row in ROWS if row not in (EVERYBODY, "afl")])
def test_whatever_learns_can_be_adapted(row, images):
    """Training lowers the loss on the client's own images, and the same call gives the same."""
    _, setup, model = learn(row)
    index = setup.clients.train[NEVER]
    mine = sorted_by_class(index, images, "mine")
    short, long = (model.adapt(mine, epochs) for epochs in (1, 4))
    assert equal(short.new.p, model.adapt(mine, epochs=1).new.p)
    x, _ = model.encode([images[i] for i in index], model.kept.method.inputs)
    y = setup.clients.labels[index]
    before, after = (F.cross_entropy(m.classifier("new").logits(x), y) for m in (short, long))
    assert after < before if long.new.p and row != "untrained" else after == before


# What is refused

EVERY = "0 to 3, and new"
ASKED = {
    "a client too many": (lambda m: m.predict("x.png", 4), ["no client 4", EVERY]),
    "a negative client": (lambda m: m.predict("x.png", -1), ["no client -1", EVERY]),
    "no client": (lambda m: m.predict("x.png", "anna"), ["no client 'anna'", EVERY]),
    "a URL": (lambda m: m.predict("https://x.org/a.png"), ["https://x.org/a.png is a URL"]),
    "a tensor": (lambda m: m.predict(torch.zeros(3, 8, 8)), ["an image is a path", "Tensor"]),
    "a number": (lambda m: m.predict([1]), ["an image is a path", "not int"]),
    "no image": (lambda m: m.predict([]), ["no image among"]),
    "no rank": (lambda m: m.predict("x.png", top=0), ["top is 0", "at least 1"]),
    "half a rank": (lambda m: m.predict("x.png", top=2.5), ["top must be", "2.5"]),
    "half an epoch": (lambda m: m.adapt("x", epochs=2.5), ["epochs must be", "2.5"]),
    "no epoch": (lambda m: m.adapt("x", epochs=0), ["epochs is 0", "at least 1"]),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_cannot_be_asked_is_refused_in_one_sentence(case, here):
    ask, words = ASKED[case]
    refuses(lambda: ask(learn("coop")[2]), words)


FOLDERS = {
    "an unknown class": ("plain_sircle/a.png", ["'plain sircle'", "did you mean 'plain s"]),
    "domains": ("photo/plain_square/a.png", ["photo/plain_square/a.png", "CLASS/FILE"]),
    "a split": ("train/a.png", ["folder named as a split"]),
    "no pictures": ("plain_square/a.txt", ["holds no images"]),
}


@pytest.mark.filterwarnings("ignore:.*of kinds that are not read")
@pytest.mark.parametrize("case", FOLDERS)
def test_other_folders_of_labelled_images_are_refused(case, images, tmp_path):
    name, words = FOLDERS[case]
    *_, model = learn("coop")
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    shutil.copy(images[0], path)
    for use in (model.evaluate, model.adapt):
        refuses(lambda use=use: use(tmp_path), words)


def test_folders_and_patterns_without_an_image_are_refused(here, tmp_path):
    *_, model = learn("coop")
    for use in (model.evaluate, model.adapt):
        with pytest.raises(FileNotFoundError, match="there is no folder gone"):
            use("gone")
    with pytest.raises(FileNotFoundError, match="has no pictures"):
        model.predict(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone/\*.png"):
        model.predict("gone/*.png")


def test_the_same_model_may_stand_in_another_folder(images, tmp_path, monkeypatch):
    *_, model = learn("coop")
    shutil.copytree("clip", tmp_path / "moved")
    moved = encoders.load(f"local-dir:{tmp_path / 'moved'}")
    kept = Path("coop.safetensors").resolve()
    keep.write(kept, model.kept)
    assert predict.restore(kept, moved).predict(images[:3]).equals(model.predict(images[:3]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no folder clip, of the CLIP of {kept}: call"):
        predict.restore(kept)
    monkeypatch.setattr(encoders, "ROOT", kept.parent)
    assert predict.restore(kept).clip.provenance["weights"] == moved.provenance["weights"]


def test_another_model_is_refused_by_what_differs(here):
    *_, model = learn("coop")
    store_clip(Path("other"), seed=1)
    other = encoders.load("local-dir:other")
    for name, words in {
        "model": ["local-dir:clip", "hf-hub:other"],
        "weights": [other.provenance["weights"][:50]],
        "architecture": [other.provenance["architecture"][:50]],
        "transform": ["0.25", "0.26"],
    }.items():
        transform = other.provenance["transform"].replace("0.25", "0.26")
        own = dict(other.provenance, model="hf-hub:other", transform=transform)
        if name == "architecture":
            own[name] = own[name][::-1]
            words = [own[name][:50]]
        told = model.clip.provenance | {name: own[name]}
        another = dataclasses.replace(model.clip, provenance=told)
        refuses(lambda other=another: predict.restore(KEPT, other), [name, *words])


def test_a_run_need_not_say_how_a_model_with_its_own_weights_is_loaded(images):
    last, setup, model = learn("promptfl")
    keep.write(KEPT, keep.of_run(setup, last, clip(), images=DATA.name))
    assert predict.restore(KEPT).predict(images[:3]).equals(model.predict(images[:3]))
    tagged = dataclasses.replace(clip(), provenance={"model": "ViT-B-16-quickgelu"})
    keep.write(KEPT, keep.of_run(setup, last, tagged))
    refuses(lambda: predict.restore(KEPT), ["which weights ViT-B-16-quickgelu had"])
    unnamed = predict.restore(KEPT, tagged)
    refuses(lambda: unnamed.predict(images), ["which data set it had", "`images`"])


def test_a_model_without_a_tower_or_patches_is_refused(images):
    *_, model = learn("fedotp")
    blind = dataclasses.replace(model, clip=encoders.load(BACKBONE.name, image_tower=False))
    refuses(lambda: blind.predict(images), ["no image tower", "fpl.load"])
    pooled = encoders.load(BACKBONE.name)
    pooled.model.visual = torch.nn.Identity()
    without = dataclasses.replace(model, clip=pooled)
    refuses(lambda: without.predict(images), ["image tower (Identity)", "no patch features"])


# The file of a run


def sweep(row="promptfl", kept=True, seed=1):
    experiment = dataclasses.replace(small(row, rounds=1), seed=seed)
    (path,) = runner.sweep([experiment], asked=Asked(keep=kept))
    return path


def test_a_run_is_named_by_its_record_or_the_beginning_of_it(images):
    path = sweep()
    wanted = predict.restore(path).predict(images[:4])
    kept = path.with_suffix(".safetensors")
    for name in (kept, path.name, path.stem, "promptfl-1", "promptfl", str(path.with_suffix(""))):
        assert predict.restore(name).predict(images[:4]).equals(wanted)
    path.unlink()
    kept.rename("mine.safetensors")
    assert predict.restore("mine.safetensors").predict(images[:4]).equals(wanted)


def test_a_name_means_no_other_seed_or_row(here):
    """Though these have kept something and the one that is meant has not."""
    sweep(kept=False)
    sweep(seed=10)
    sweep("promptfl_released")
    for name in ("promptfl-1", "promptfl-1-"):
        with pytest.raises(
            FileNotFoundError, match=r"promptfl-1-\w+.json is of a run that kept noth"
        ):
            predict.restore(name)
    assert predict.file_of("promptfl").stem.startswith("promptfl-10-")
    assert predict.file_of("promptfl_r").stem.startswith("promptfl_released-1-")


def test_what_another_run_learnt_is_not_taken_for_this_one_s(here):
    first, second = sweep(), sweep(seed=2)
    kept = first.with_suffix(".safetensors")
    mine = kept.read_bytes()
    kept.write_bytes(second.with_suffix(".safetensors").read_bytes())
    refuses(lambda: predict.restore(first), [f"is of {second.stem}", "not of the record beside it"])
    shutil.copy(kept, "elsewhere.safetensors")
    assert predict.restore("elsewhere.safetensors").kept.seeds.order == 2
    sweep()
    assert predict.restore(first).kept.seeds.order == 1 and kept.read_bytes() == mine


def test_files_that_are_not_there_or_damaged_are_refused_in_one_sentence(here):
    kept = sweep().with_suffix(".safetensors")
    sweep(kept=False, seed=2)
    with pytest.raises(FileNotFoundError, match="promptfl-2.*kept nothing.*--keep"):
        predict.restore("promptfl-2")
    with pytest.raises(FileNotFoundError, match="there is no run promptfl-3 in results/records"):
        predict.restore("promptfl-3")
    assert predict.file_of("promptfl") == kept, "the other has kept nothing"
    other = sweep(seed=3).with_suffix(".safetensors")
    refuses(lambda: predict.restore("promptfl"), ["2 runs begin with promptfl", "write more"])
    other.unlink()
    whole = kept.read_bytes()
    for content in (whole[:-9], whole[:40], b"", whole[:-9] + b"damage!!!", b"no safetensors"):
        kept.write_bytes(content)
        refuses(lambda: predict.restore(kept), [str(kept), "damaged", "again, with --keep"])
    for metadata in (None, {"fpl": '{"classes": []}'}):  # the second as of an export
        kept.write_bytes(safetensors.torch.save({"weight": torch.zeros(2)}, metadata))
        refuses(lambda: predict.restore(kept), [str(kept), "no file of a run", "made with --keep"])


def test_a_method_of_ones_own_is_used_where_its_class_is_given(images, capsys):
    Path("my_method.py").write_text(
        "from dataclasses import dataclass\nfrom fpl.methods import PromptFL\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(PromptFL):\n"
        "    def logits(self, text, t, p, context, x):\n"
        "        return -super().logits(text, t, p, context, x)\n"
    )
    runner.sweep([PARAMS.experiment("my_method.py:Mine", 1, n_ctx=2)], asked=Asked(keep=True))
    refuses(lambda: predict.restore("mine-1"), ["a class of your own"])
    cli.main(["predict", "mine-1", str(images[0]), "--method", "my_method.py:Mine"])
    assert "image" in capsys.readouterr().out


# The command


def test_the_command_answers_as_the_function_does(images, tmp_path, capsys):
    path = sweep("pfedmoap")
    names = [*map(str, images[:3])]
    cli.main(["predict", "pfedmoap-1", *names, "--client", "2", "--top", "2"])
    shown = capsys.readouterr().out
    wanted = predict.restore(path).predict(names, 2, top=2)
    assert shown.count("\n") == 8 and all(name in shown for name in names)
    assert all(f"{share:.4f}" in shown for share in wanted["probability"])
    csv = tmp_path / "answers.csv"
    cli.main(["predict", "pfedmoap-1", *names, "--client=2", "--top=2", f"--csv={csv}"])
    assert capsys.readouterr().out == f"table: {csv}\n"
    read = pd.read_csv(csv)
    assert read["class"].tolist() == wanted["class"].tolist()
    assert read["probability"].tolist() == pytest.approx(wanted["probability"].tolist())


def test_no_picture_is_replaced_by_a_table(images, tmp_path):
    """As where the name of the table's file was forgotten."""
    photo = shutil.copy(images[0], tmp_path / "holiday.png")
    before = Path(photo).read_bytes()
    sweep()
    for line in (["--csv", photo, str(images[1])], [photo, "--csv", photo]):
        with pytest.raises(SystemExit, match=r"holiday\.png is a picture"):
            cli.main(["predict", "promptfl", *map(str, line)])
    assert Path(photo).read_bytes() == before


def test_the_command_names_what_it_cannot_read_and_ends_with_1(images, capsys):
    sweep()
    with pytest.raises(SystemExit) as error:
        cli.main(["predict", "promptfl", "gone.png", str(images[0])])
    shown = capsys.readouterr()
    said = "fpl predict: gone.png cannot be read: No such file or directory\n"
    assert error.value.code == 1 and str(images[0]) in shown.out and "gone" not in shown.out
    assert shown.err.endswith(said)


def test_the_command_evaluates_and_adapts(images, tmp_path, capsys):
    path = sweep()
    setup = assemble.setup_of(small("promptfl", rounds=1))
    mine = sorted_by_class(setup.clients.train[0], images, "mine")
    cli.main(["predict", "promptfl", mine, "--evaluate", "--adapt", mine, "--epochs", "2"])
    shown = capsys.readouterr().out
    wanted = predict.restore(path).adapt(mine, 2).evaluate(mine, "new")
    assert f"accuracy: {100 * wanted.accuracy:.2f} %" in shown
    assert f"macro-F1: {100 * wanted.macro_f1:.2f} %" in shown
    there = wanted.confusion.index[wanted.confusion.any(axis=1)]
    assert all(f"| {name}" in shown for name in there)
    csv = tmp_path / "confusion.csv"
    cli.main(["predict", "promptfl", mine, "--evaluate", "--adapt", mine, f"--csv={csv}"])
    assert pd.read_csv(csv, index_col="class").shape == (30, 30)


TOGETHER = {
    "adapt and a client": (["--adapt", "a", "--client", "3"], "for a new client, not for 3"),
    "epochs alone": (["--epochs", "3"], "--adapt FOLDER: give both"),
    "evaluate and top": (["--evaluate", "--top", "3"], "takes one folder"),
    "evaluate two": (["b", "--evaluate"], "takes one folder"),
    "a folder for a table": (["--csv", "."], "is a folder"),
    "no run": ([], "there is no run none in results/records"),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_options_that_do_not_go_together_are_refused(case, here):
    options, words = TOGETHER[case]
    with pytest.raises(SystemExit, match=f"^fpl predict: .*{words}"):
        cli.main(["predict", "none", "a.png", *options])


def test_a_record_says_what_a_file_needs(here):
    """What `restore` reads of a run that was made by the command."""
    path = sweep()
    about = predict.restore(path).kept.about
    assert about["images"] == json.loads(path.read_text())["images"] == DATA.name
    assert about["backbone"] == dataclasses.asdict(BACKBONE)
