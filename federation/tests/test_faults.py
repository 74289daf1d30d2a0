"""Promise: a site and the server that are killed come back, and the numbers are the loop's."""

from dataclasses import replace

import torch

from federation import rehearsal
from federation.protocol import read
from federation.rehearsal import CLIP, SITES, finished, wait_for
from fpl.experiments import stored, verbs

SECONDS = 400.0  # for a round, on a machine that does much else


def test_a_site_and_the_server_are_killed_in_the_middle_of_a_round(machine):
    folder = machine.folder
    classes = rehearsal.draw_sites(folder, classes=6, train=4, test=4)
    path, state = folder / "agreement.yaml", folder / "prompt" / "server.safetensors"
    training = {"rounds": 3, "local_epochs": 1}
    said = {"name": "prompt", "classes": classes, "method": "promptfl", "settings": {"n_ctx": 4}}
    rehearsal.write_agreement(path, **said, training=training)

    def start_link():
        machine.start_link()
        wait_for("the SuperLink", lambda: machine.log("superlink").count("startup complete") > ups)

    machine.link = [*machine.link, "--database", str(folder / "link.db")]  # knows its sites again
    ups = 0
    start_link()
    for site in SITES:
        machine.start_site(site)
    machine.submit("prompt", path, timeout=100.0)
    wait_for("round 0", lambda: finished(state, 1), SECONDS)
    machine.kill("west")  # round 1 has begun
    machine.start_site("west")
    wait_for("round 1", lambda: finished(state, 2), SECONDS)
    ups = machine.log("superlink").count("startup complete")
    machine.kill("superlink")  # round 2 has begun
    start_link()
    machine.submit("prompt", path, timeout=100.0)
    wait_for("round 2", lambda: finished(state, 3), SECONDS)

    agreement = read(path, verbs.load(CLIP).provenance)
    asked = [x for x in stored.read(state)[1]["lines"] if x["kind"] == "train"]
    assert {x["round"] for x in asked if x["site"] == "west"} == {0, 2}
    assert {x["round"] for x in asked if x["site"] == "north"} == {0, 1, 2}
    everybody = torch.arange(3)
    turns = [everybody, everybody[:2], everybody]
    table = rehearsal.compare(folder, agreement, state, lambda x: replace(x, turns=turns))
    assert (table["accuracy"] == table["of the loop"]).all()
    assert (table["prompts differ by"] < 1e-6).all()
