"""That the hosts are what their tests take them for: apart from each other, and cut off as hosts are."""

import sys
import time

import pytest
from watching import wait_for

ANSWERS = "import urllib.request; urllib.request.urlopen('http://{}:8000/', timeout=2).read()"


@pytest.fixture(scope="module")
def pair(lab):
    one, other = lab.host("one"), lab.host("other", clock_s=300)
    other.start(sys.executable, "-m", "http.server", "8000")
    wait_for(lambda: reaches(one, "other"), "the other host's server", 30)
    return one, other


def reaches(host, name) -> bool:
    return host.run(sys.executable, "-c", ANSWERS.format(name)).returncode == 0


def test_each_has_its_own_processes_files_and_clock_and_one_shared_folder(lab, pair):
    one, other = pair
    for folder in ("/tmp", "/dev/shm"):
        assert one.run("touch", f"{folder}/mine").returncode == 0 and other.run("ls", f"{folder}/mine").returncode != 0
    one.run("touch", "ours")
    assert (lab.shared / "ours").exists() and "ours" in other.run("ls").stdout
    assert one.run("hostname").stdout.strip() == "one" and "http.server" not in one.run("ps", "ax").stdout
    clock = "import time; print(time.time())"
    ahead = float(other.run(sys.executable, "-c", clock).stdout) - float(one.run(sys.executable, "-c", clock).stdout)
    assert 295 < ahead < 305


def test_a_cut_link_loses_what_is_sent_and_can_be_mended(lab, pair):
    one, other = pair
    lab.cut(one, other)
    begun = time.monotonic()
    assert not reaches(one, "other") and time.monotonic() - begun > 1.5  # silence, not a refusal
    lab.mend(one, other)
    wait_for(lambda: reaches(one, "other"), "what is sent to arrive again", 30)
    assert one.received_bytes() > 0 and one.sent_bytes() > 0


def test_without_power_a_host_says_nothing_any_more(lab, pair):
    one, _ = pair
    third = lab.host("third")
    server = third.start(sys.executable, "-m", "http.server", "8000")
    wait_for(lambda: reaches(one, "third"), "the third host's server", 30)
    third.power_cut()
    begun = time.monotonic()
    assert server.wait(timeout=10) and not reaches(one, "third") and time.monotonic() - begun > 1.5
