"""A slow cable: joins two network devices and holds every frame for a while, in each direction.

    python slow_link.py FAR NEAR SECONDS

makes the tap devices FAR and NEAR in the network namespace that it runs in, and prints `ready` and its process id. FAR
may then be moved to a machine's namespace, and NEAR joined to a bridge. Kernels without `netem` have no other way. It
needs root and /dev/net/tun.
"""

import contextlib
import fcntl
import os
import selectors
import struct
import sys
import time
from collections import deque

_SET_DEVICE, _TAP_WITHOUT_HEADER = 0x400454CA, 0x0002 | 0x1000
_LONGEST_FRAME = 2048


def main() -> None:
    """Forwards frames until the process is ended."""
    far, near, seconds = tap(sys.argv[1]), tap(sys.argv[2]), float(sys.argv[3])
    print(f"ready {os.getpid()}", flush=True)
    forward({far: near, near: far}, seconds)


def tap(name: str) -> int:
    """The file descriptor of a new tap device."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _SET_DEVICE, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    return device


def forward(other_end: dict[int, int], seconds: float) -> None:
    """Each frame of a device goes to its other end, `seconds` after it came."""
    selector = selectors.DefaultSelector()
    for device in other_end:
        selector.register(device, selectors.EVENT_READ)
    held: deque[tuple[float, int, bytes]] = deque()  # all are held as long, so the first one goes first
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        for key, _ in selector.select(wait):
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = os.read(key.fd, _LONGEST_FRAME)
                    held.append((time.monotonic() + seconds, other_end[key.fd], frame))
        while held and held[0][0] <= time.monotonic():
            _, device, frame = held.popleft()
            with contextlib.suppress(OSError):  # a device that is down, or full: as on a cable, the frame is lost
                os.write(device, frame)


if __name__ == "__main__":
    main()
