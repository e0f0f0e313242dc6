"""Puts accelerators' power limits back, whatever died; run as a process of its own beside whoever set them, so it imports nothing of ours.

`python -I -S restore.py PIPE READY PARENT FOLDER UUID...` waits until the pipe ends or its parent is another process, puts back what the records of these
accelerators say, and ends. It holds the locks of the accelerators too (inherited), so that nobody takes one between a death and this. Signals that end a run
pass it by; its session is its own.

A record, FOLDER/UUID.json, is written before a limit is changed and removed after it is put back: {"uuid", "boot", "scope", "found_mw", "default_mw", "set_mw":
the last two values, "pid", "run"}. One of another boot is void: a boot resets limits. A limit that is neither what was found nor what was set was changed by
somebody else since, and is left alone.

A record is believed only as a regular file of whoever owns its folder, and of the shape that is written here; no link is followed.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import stat
import sys
from collections.abc import Sequence
from typing import Any

GPU, MODULE = 0, 1  # NVML's power scopes
NO_PERMISSION, NOT_SUPPORTED = 4, 3
NEAR_MW = 1000  # a driver may round what it is given
MOST_MW, MOST_BYTES = 1 << 32, 1 << 16  # of a record; more is none
IGNORED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGTSTP")
LOOK_S = 0.5
_MIN, _MAX, _DEFAULT, _CURRENT = 187, 188, 189, 190  # NVML_FI_DEV_POWER_*_LIMIT, which take a scope
_VALUE_V2 = 0x0200000C


class Refused(Exception):
    """NVML did not do it: `code` is its own, `text` what it says of it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


class _Field(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("stamp", ctypes.c_longlong),
        ("latency", ctypes.c_longlong),
        ("kind", ctypes.c_uint),
        ("result", ctypes.c_uint),
        ("value", ctypes.c_ulonglong),
    )


class _Value(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint), ("scope", ctypes.c_uint), ("mw", ctypes.c_uint))


class Limits:
    """Power limits of accelerators by UUID, in milliwatts. nvidia-ml-py is not used: its setter with a scope drops NVML's answer, and this must run without
    site-packages."""

    def __init__(self) -> None:
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as failure:
            raise Refused(-1, f"there is no libnvidia-ml.so.1: {failure}") from None
        self._call("nvmlInit_v2")

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def handle(self, uuid: str) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(uuid.encode()), ctypes.byref(found))
        return found

    def scope(self, handle: ctypes.c_void_p) -> int:
        """MODULE where the limit is the module's (GH200 and later), else GPU."""
        try:
            self._field(handle, _CURRENT, MODULE)
        except Refused:
            return GPU
        return MODULE if hasattr(self._nvml, "nvmlDeviceSetPowerManagementLimit_v2") else GPU

    def limit(self, handle: ctypes.c_void_p, scope: int) -> int:
        return self._field(handle, _CURRENT, MODULE) if scope == MODULE else self._number("nvmlDeviceGetPowerManagementLimit", handle)

    def default(self, handle: ctypes.c_void_p, scope: int) -> int:
        if scope == MODULE:
            return self._field(handle, _DEFAULT, MODULE)
        return self._number("nvmlDeviceGetPowerManagementDefaultLimit", handle)

    def range(self, handle: ctypes.c_void_p, scope: int) -> tuple[int, int]:
        """The least and the most that the driver takes."""
        if scope == MODULE:
            return self._field(handle, _MIN, MODULE), self._field(handle, _MAX, MODULE)
        least, most = ctypes.c_uint(), ctypes.c_uint()
        self._call("nvmlDeviceGetPowerManagementLimitConstraints", handle, ctypes.byref(least), ctypes.byref(most))
        return least.value, most.value

    def set(self, handle: ctypes.c_void_p, scope: int, mw: int) -> None:
        if scope == MODULE:
            self._call("nvmlDeviceSetPowerManagementLimit_v2", handle, ctypes.byref(_Value(_VALUE_V2, MODULE, mw)))
        else:
            self._call("nvmlDeviceSetPowerManagementLimit", handle, ctypes.c_uint(mw))

    def _number(self, name: str, handle: ctypes.c_void_p) -> int:
        found = ctypes.c_uint()
        self._call(name, handle, ctypes.byref(found))
        return found.value

    def _field(self, handle: ctypes.c_void_p, number: int, scope: int) -> int:
        one = _Field(id=number, scope=scope)
        self._call("nvmlDeviceGetFieldValues", handle, ctypes.c_int(1), ctypes.byref(one))
        if one.result:
            raise Refused(one.result, self._said(one.result))
        return int(one.value & 0xFFFFFFFF)

    def _call(self, name: str, *given: Any) -> None:
        function = getattr(self._nvml, name, None)
        if function is None:
            raise Refused(13, f"this driver has no {name}")
        code = function(*given)
        if code:
            raise Refused(code, self._said(code))

    def _said(self, code: int) -> str:
        function = self._nvml.nvmlErrorString
        function.restype = ctypes.c_char_p
        return (function(ctypes.c_int(code)) or b"error %d" % code).decode("utf-8", "replace")


def boot() -> str:
    """This boot of this machine."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def path_of(folder: str, uuid: str) -> str:
    return os.path.join(folder, uuid + ".json")


def read(folder: str, uuid: str, owner: int | None = None) -> dict[str, Any] | None:
    """The record of an accelerator, or None; a torn one cannot be, since it is renamed into its place. `owner` of the folder: this user, if not another.

    Raises OSError, and ValueError for what is no record.
    """
    path = path_of(folder, uuid)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        whose = os.fstat(descriptor)
        text = file.read(MOST_BYTES) if owned(whose, os.getuid() if owner is None else owner) else None
    if text is None:
        raise ValueError(f"it is no file of its folder's owner alone (uid {whose.st_uid}, {stat.filemode(whose.st_mode)})")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("uuid") != uuid or not isinstance(found.get("boot"), str):
        raise ValueError("it is no record of this accelerator's limit")
    numbers = [found.get("scope"), found.get("found_mw"), *(said if isinstance(said := found.get("set_mw"), list) else [None])]
    if not all(type(one) is int and 0 <= one < MOST_MW for one in numbers) or found["scope"] not in (GPU, MODULE):
        raise ValueError("it lacks numbers that a record has")
    return found


def owned(found: os.stat_result, owner: int) -> bool:
    """A regular file of this user, which nobody else can write."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o022


def write(folder: str, record: dict[str, Any]) -> None:
    """Whole or not at all, whoever is killed."""
    path = path_of(folder, record["uuid"])
    new = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)  # of a process of this number that was killed
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


def forget(folder: str, uuid: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path_of(folder, uuid))


def put_back(limits: Limits, folder: str, uuid: str, record: dict[str, Any] | None = None) -> str | None:
    """Put one limit back by its record and remove that; what was done, in words, or None where nothing was to be done. `record`: by who set it himself and
    needs no file. Raises Refused, OSError or ValueError, and keeps the record."""
    record = read(folder, uuid) if record is None else record
    if record is None:
        return None
    if record["boot"] != boot():
        forget(folder, uuid)
        return f"{uuid}: the record of its power limit is of another boot, which reset it"
    handle, scope, found = limits.handle(uuid), record["scope"], record["found_mw"]
    now = limits.limit(handle, scope)
    done = None
    if abs(now - found) > NEAR_MW:
        if any(abs(now - one) <= NEAR_MW for one in record["set_mw"]):
            limits.set(handle, scope, found)
            done = f"{uuid}: power limit {found // 1000} W, as it was found ({now // 1000} W before)"
        else:
            done = (
                f"{uuid}: power limit {now // 1000} W is neither what was found ({found // 1000} W) nor what was set; "
                "somebody else changed it, and it stays"
            )
    forget(folder, uuid)
    return done


def to_default(limits: Limits, folder: str, uuid: str, owner: int) -> str | None:
    """The same for root by the record of another user, which may be forged: no number of it is ever set. Where it is of this boot and names the limit that the
    accelerator has, below its driver's default, that default is set. Words or None; raises Refused, OSError or ValueError."""
    record = read(folder, uuid, owner)
    if record is None:
        return None
    if record["boot"] != boot():
        forget(folder, uuid)
        return None
    handle = limits.handle(uuid)
    scope = limits.scope(handle)
    now, default, (least, most) = limits.limit(handle, scope), limits.default(handle, scope), limits.range(handle, scope)
    if not all(least - NEAR_MW <= one <= most + NEAR_MW for one in (record["found_mw"], *record["set_mw"])):
        raise ValueError("it has numbers that the driver does not take")
    done = None
    if abs(now - default) > NEAR_MW:
        if now > default or not any(abs(now - one) <= NEAR_MW for one in record["set_mw"]):
            done = f"{uuid}: power limit {now // 1000} W is none that uid {owner} has set below the driver's default; it stays"
        else:
            limits.set(handle, scope, default)
            done = f"{uuid}: power limit {default // 1000} W, the driver's default ({now // 1000} W before, by a run of uid {owner})"
    forget(folder, uuid)
    return done


def main(pipe: int, ready: int, parent: int, folder: str, uuids: Sequence[str]) -> int:
    """Until the parent is gone; then put back. Leaves with 1 where that could not be done."""
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    limits = Limits()
    for uuid in uuids:
        limits.handle(uuid)
    os.write(ready, b"1")
    os.close(ready)
    while os.getppid() == parent:
        if select.select([pipe], [], [], LOOK_S)[0] and not os.read(pipe, 64):
            break
    code = 0
    for uuid in uuids:
        said = None
        for turn in range(3):
            try:
                said = put_back(limits, folder, uuid)
                break
            except (Refused, OSError, ValueError, KeyError) as failure:
                said = f"{uuid}: POWER LIMIT NOT PUT BACK: {failure}; python -m gigatrain.power.guard --restore"
                code = 1 if turn == 2 else code
        if said:
            with contextlib.suppress(OSError):
                os.write(2, f"gigatrain: {said}\n".encode())
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:]))
