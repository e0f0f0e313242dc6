"""The GPU's counters through the real nvidia-ml-py and a stub driver, each fault by itself; the kernel's log from canned text; AMD's files from a made tree."""

import pytest

from gigatrain.preflight import gpu

NAMES = ["gpus", *gpu.EACH, "kernel log", "amd gpus", "under load", "two looks", "peer"]
LOADED = ("throttle", "pcie", "under load", "two looks")  # look at the same


def test_a_healthy_node_has_nothing_to_say(ask):
    found = ask()
    assert list(found) == NAMES
    assert {one["state"] for name, one in found.items() if name not in ("kernel log", "amd gpus")} == {"ok"}
    assert found["gpus"]["said"] == "8 x NVIDIA H100 80GB HBM3, driver 580.65.06, which runs CUDA 13.0"
    assert found["nvlink"]["said"] == "18 NVLinks active"
    assert found["kernel log"]["state"] == "untested"
    assert "/nonexistent/dev/kmsg" in found["kernel log"]["said"]


@pytest.mark.parametrize(
    ("faults", "name", "state", "words"),
    [
        ({"ECC_VOLATILE": "3:2"}, "ecc", "bad", "GPU 3: 2 uncorrected ECC errors"),
        ({"ECC_AGGREGATE": "3:2"}, "ecc", "ok", "2 uncorrected ECC errors ever"),
        ({"ROW_FAILED": "0:1"}, "ecc", "bad", "GPU 0: a row could not be remapped"),
        ({"ROW_PENDING": "7:1"}, "ecc", "bad", "GPU 7: a row waits for a reset"),
        ({"ROWS": "7:4"}, "ecc", "ok", "4 rows remapped"),
        ({"ECC_OFF": "*:1"}, "ecc", "warn", "ECC is off"),
        ({"RECOVERY": "2:4"}, "recovery", "bad", "GPU 2: the driver wants: drain and reset"),
        ({"REASONS": "1:72"}, "throttle", "bad", "GPU 1: slowed down: hardware slowdown; GPU 1: slowed down: hardware thermal slowdown"),
        ({"REASONS": "1:128"}, "throttle", "bad", "power brake"),
        ({"REASONS": "1:32"}, "throttle", "warn", "software thermal slowdown"),
        ({"REASONS": "1:4"}, "throttle", "ok", "at its power limit"),
        ({"CLOCK": "5:1200"}, "clocks", "warn", "GPU 5: limited to 1200 of 1980 MHz"),
        ({"CELSIUS": "4:75"}, "temperature", "warn", "GPU 4: 75 °C before any work"),
        ({"CELSIUS": "4:89"}, "temperature", "bad", "89 °C, it slows down at 90"),
        ({"WATTS": "6:350"}, "power", "warn", "power limit 350 W, by default 700 W"),
        ({"WATTS": "*:500"}, "power", "ok", "power limit 500 W"),
        ({"REASONS": "1:8"}, "throttle", "warn", "GPU 1: slowed down: hardware slowdown"),
        ({"REASONS": "1:8"}, "under load", "bad", "GPU 1: slowed down: hardware slowdown"),  # in each of three looks
        ({"REASONS": "1:8"}, "two looks", "warn", "GPU 1: slowed down: hardware slowdown"),
        ({"LANES": "2:8"}, "pcie", "warn", "GPU 2: PCIe x8 of x16 while idle"),
        ({"LANES": "2:8"}, "under load", "bad", "GPU 2: PCIe x8 of x16 under load"),
        ({"GENERATION": "2:4"}, "under load", "warn", "GPU 2: PCIe generation 4 of 5 under load"),
        ({"GRACE": "*:1", "LANES": "*:1"}, "pcie", "untested", "NVIDIA GH200 120GB is joined to its CPU by C2C"),
        ({"GRACE": "*:1", "LANES": "*:1"}, "under load", "ok", "not slowed down"),
        ({"DEPRECATED": "*:1"}, "clocks", "ok", "up to 1980 MHz"),
        ({"GENERATION": "*:1"}, "pcie", "ok", "(1 now, idle)"),
        ({"LINK_DOWN": "3:11"}, "nvlink", "bad", "GPU 3: NVLink 11 of 18 down"),
        ({"LINKS_DOWN": "*:1"}, "nvlink", "untested", "none of its 18 NVLinks is active"),  # cards without a bridge
        ({"LINKS_DOWN": "2:1"}, "nvlink", "bad", "GPU 2: none of its 18 NVLinks is active"),
        ({"LINK_DOWN": "*:11"}, "nvlink", "warn", "NVLink 11 of 18 down, as on others of this node"),  # bridges that join a part
        ({"LINKS": "*:0"}, "nvlink", "untested", "do not tell"),
        ({"LINK_RECOVERIES": "3:9"}, "nvlink", "warn", "GPU 3: NVLink 5 counted 9 recoveries"),
        ({"MIG": "0:1"}, "mode", "warn", "MIG is on"),
        ({"PERSISTENT": "*:0"}, "mode", "ok", "not persistent"),
        ({"STRANGER": "0:4242"}, "others", "warn", "GPU 0: in use by process 4242"),
        ({"LOST": "6:1"}, "ecc", "bad", "GPU 6: GPU is lost"),
        ({"LOST": "6:1"}, "gpus", "bad", "7 x NVIDIA H100 80GB HBM3, driver 580.65.06, which runs CUDA 13.0; GPU 6: GPU is lost"),
        ({"GPUS": "7"}, "gpus", "bad", "7 x NVIDIA H100 80GB HBM3"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_fault_is_found_and_named(ask, faults, name, state, words):
    found = ask(faults)
    assert (found[name]["state"], words in found[name]["said"]) == (state, True), found[name]
    if state in ("bad", "warn"):
        assert found[name]["way_out"]
    if "LOST" not in faults:  # a fault is told by its own check alone
        own = LOADED if name in LOADED else (name,)
        others = {one["state"] for other, one in found.items() if other not in (*own, "kernel log", "amd gpus")}
        assert others == {"ok"}


def test_a_gpu_that_is_lost_as_it_is_opened_is_named_and_the_others_are_examined(ask):
    found = ask({"GONE": "3:1"})
    assert (found["gpus"]["state"], "; GPU 3: GPU is lost" in found["gpus"]["said"]) == ("bad", True)
    assert (found["ecc"]["state"], found["ecc"]["said"]) == ("bad", "GPU 3: GPU is lost")
    assert found["kernel log"]["state"] == "untested"


def test_a_gpu_of_another_job_is_not_this_ones_fault(ask):
    found = ask({"FORBIDDEN": "3:1"}, accelerators=7)
    assert (found["gpus"]["state"], found["gpus"]["value"]) == ("ok", 7)
    assert "; GPU 3: " in found["gpus"]["said"]
    assert found["ecc"]["state"] == "ok"


def test_what_one_gpu_has_to_another_depends_on_a_switch(ask):
    assert ask()["peer"]["value"] == 450
    assert ask({"MESH": "*:1", "GPUS": "4"}, 4)["peer"]["value"] == 150  # JUPITER: three peers
    assert ask({"NO_REMOTE": "*:1"})["peer"]["value"] is None  # no limit


def test_without_a_driver_every_check_says_so():
    found = gpu.counted(False, None)
    assert (found.state, found.said.startswith("no NVIDIA GPU: ")) == ("untested", True)
    assert gpu.counted(True, 8).state == "bad"
    for name, one in gpu.EACH.items():
        assert gpu._each(name, one).state == "untested"


LOG = """\
[    0.000000] Linux version 6.8.0
[  812.100000] NVRM: Xid (PCI:0000:1b:00): 13, pid=1896, name=python, Graphics Exception
[  900.000000] NVRM: {}
6,339,912000000,-;eth0: link becomes ready
"""


@pytest.mark.parametrize(
    ("line", "state", "words"),
    [
        (
            "Xid (PCI:0000:1b:00): 79, pid='<unknown>', GPU has fallen off the bus.",
            "bad",
            "Xid 79 on 0000:1b:00, GPU has fallen off the bus",
        ),
        ("Xid (PCI:0000:9d:00): 74, pid=100, NVLink: fatal error detected on link 6", "bad", "NVLink error"),
        ("Xid (PCI:0000:9d:00): 48, pid=100, An uncorrectable double bit error (DBE)", "bad", "double-bit ECC error"),
        ("Xid (PCI:0000:9d:00): 119, pid=100, Timeout after 6s of waiting for RPC response from GPU0 GSP!", "bad", "GSP timeout"),
        (
            "Xid (PCI:0000:9d:00): 63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to activate.",
            "warn",
            "a memory row was remapped",
        ),
        ("Xid (PCI:0000:9d:00): 31, pid=1896, MMU Fault", "ok", "2 Xids of programs' own faults"),
        (
            "Xid (PCI:0000:9d:00): 149, NETIR_LINK_EVT Fatal   XC0 i0 Link 04 (0x000004c6 0x00000000)",
            "bad",
            "NVLink error: NETIR_LINK_EVT Fatal",
        ),
        ("Xid (PCI:0000:9d:00): 149, NETIR_LINK_EVT Nonfatal XC0 i0 Link 04 (0x000004c6 0x00000000)", "warn", "Nonfatal"),
        (
            "Xid (PCI:0000:9d:00): 154, GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)",
            "bad",
            "Node Reboot Required",
        ),
        ("Xid (PCI:0000:9d:00): 154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)", "ok", "no hardware error"),
        ("Xid (PCI:0000:9d:00): 999, pid=1896", "warn", "not in our table"),
        ("nothing of note", "ok", "no hardware error in 4 lines; 1 Xids"),
    ],
)
def test_xids_are_told_by_what_they_mean(line, state, words):
    found = gpu.judged_log(LOG.format(line).splitlines(), 1000)
    assert (found.state, words in found.said) == (state, True), found


def test_an_old_xid_warns_and_other_hardware_is_heard():
    assert gpu.judged_log(["[  900.0] NVRM: Xid (PCI:0000:1b:00): 79, fallen off"], 900 + 3 * 86400).state == "warn"
    assert gpu.judged_log(["6,339,900000000,-;NVRM: Xid (PCI:0000:1b:00): 79, fallen off"], 1000).state == "bad"
    assert gpu.judged_log(["[ 1.0] mce: [Hardware Error]: CPU 3: Machine Check: Uncorrected error"], 10).state == "bad"
    assert gpu.judged_log(["[ 1.0] nvidia-nvswitch0: SXid (PCI:0000:c1:00.0): 20034, Fatal, Link 30 LTSSM Fault Up"], 10).state == "bad"
    for line, words in (("(Non-Fatal) error received", "an error that is not fatal"), ("(Fatal) error received", "a fatal error")):
        found = gpu.judged_log([f"[ 1.0] pcieport 0000:00:01.0: AER: Uncorrected {line}: 0000:01:00.0"], 10)
        assert found.said.startswith(f"a PCIe device reported {words}: ")
    assert gpu.judged_log(["[ 1.0] EDAC MC0: 1 UE memory read error on CPU_SrcID#0"], 10).state == "bad"


def test_the_kernels_own_log_is_read_where_it_may_be(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kmsg").write_text("4,1,900000000,-;NVRM: Xid (PCI:0000:1b:00): 48, DBE\n")
    assert gpu.kernel_log(tmp_path, 1000).state == "bad"
    assert gpu.kernel_log().state in ("ok", "warn", "bad", "untested")  # this machine's, by its own way of reading
    (tmp_path / "dev/kmsg").unlink()
    (tmp_path / "dev/kmsg").mkdir()
    assert gpu.kernel_log(tmp_path).state == "untested"


def amd_tree(root, cards=4):
    for index in range(cards):
        card = root / f"sys/class/drm/card{index}/device"
        (card / "ras").mkdir(parents=True)
        for name, value in {"vendor": "0x1002", "mem_info_vram_total": "1", "current_link_width": "16", "max_link_width": "16"}.items():
            (card / name).write_text(value + "\n")
        (card / "ras/umc_err_count").write_text("ue: 0\nce: 2\n")
    return root


def test_amd_gpus_are_judged_by_the_kernels_files(tmp_path):
    root = amd_tree(tmp_path)
    assert gpu.amd(root, 4).state == "ok"
    assert gpu.counted(True, 4, root).state == "untested"  # no NVIDIA GPU is no fault of a node of AMD's
    assert gpu.amd(root, 8).said == "4 GPUs, the site says 8"
    (root / "sys/class/drm/card2/device/ras/umc_err_count").write_text("ue: 3\nce: 2\n")
    (root / "sys/class/drm/card1/device/current_link_width").write_text("8\n")
    found = gpu.amd(root, 4)
    assert found.state == "bad"
    assert "card2: 3 uncorrectable errors in umc" in found.said
    assert "card1: PCIe x8 of x16" in found.said
