"""Promise: only sites with a registered key come in, and only to a server that proves its name."""

import papers

from federation.rehearsal import SITES, wait_for


def test_an_unknown_key_and_a_wrong_certificate_are_refused(machine):
    folder = machine.folder
    for place in ("authority", "stranger"):
        papers.authority(folder / place)
    for site in SITES:
        papers.keys(folder / f"{site}.key")
        trusted = folder / ("stranger" if site == "west" else "authority") / "ca.crt"
        private = ("--auth-supernode-private-key", str(folder / f"{site}.key"))
        machine.node[site] = ("--root-certificates", str(trusted), *private)
    place = folder / "authority"
    files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
    options = [x for k, name in files.items() for x in (f"--ssl-{k}", str(place / name))]
    machine.link = [*options, "--enable-supernode-auth"]
    machine.client = f'root-certificates = "{place / "ca.crt"}"'
    machine.start_link()
    wait_for("the SuperLink", lambda: "startup complete" in machine.log("superlink"))
    machine.connect()
    for site in ("north", "west"):  # south's key stays unknown
        public = str(folder / f"{site}.pub")
        assert (
            machine.start(f"register_{site}", "flwr", "supernode", "register", public).wait() == 0
        )
    for site in SITES:
        machine.start_site(site)
    wait_for("north", lambda: "Activated" in machine.log("superlink"))
    for site in ("south", "west"):
        wait_for(site, lambda site=site: machine.running[site].poll() is not None)
        assert machine.running[site].returncode
    assert "No SuperNode found with the given public key" in machine.log("superlink")
    assert "CERTIFICATE_VERIFY_FAILED" in machine.log("west")
    assert machine.running["north"].poll() is None
    assert machine.log("superlink").count("Activated") == 1
