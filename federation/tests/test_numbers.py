"""Promise: Flower changes no number: accuracies are the loop's, bytes those of our tables."""

from federation import rehearsal


def test_simulated_sites_get_what_the_loop_gets(tmp_path, port):
    found = rehearsal.federate(tmp_path, port, simulated=True)
    assert len(found) == len(rehearsal.METHODS) * len(rehearsal.SITES)
    assert (found["accuracy"] == found["of the loop"]).all()
    assert (found["prompts differ by"] < 1e-6).all()
    for way in ("up", "down"):
        assert (found[f"{way}, bytes"] == found[f"4 x numbers {way}"]).all()
        assert (found[f"messages {way}"] > found[f"{way}, bytes"]).all()
