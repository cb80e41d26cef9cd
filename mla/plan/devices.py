"""Data sheets of devices, and of the links between them. Peak figures, not measured ones.

Arithmetic is that of dense bfloat16 products with float32 sums. Kernels turn coded rows into
bfloat16 before they multiply, so this peak also counts for rows of 8 and 4 bits. Links count one
direction: data sheets give the sum of both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mla.checks import UnsupportedError

# Devices whose limits the user gives: of any kind, or of a processor, whose rows `measured` reads.
PROCESSOR = "cpu"
GIVEN = ("custom", PROCESSOR)


class Link(NamedTuple):
    """What one device can send."""

    name: str
    bytes_per_second: float  # in one direction
    source: str


class Device(NamedTuple):
    """Limits of one device, and how its neighbours are reached."""

    name: str
    memory: float  # bytes
    bytes_per_second: float  # of its memory
    flops_per_second: float
    link: str  # inside a node, a key of `LINKS`
    node: int  # devices of a node
    source: str
    driver_name: str = ""  # as rows have it; `PROCESSOR`: any; "": none


LINKS: dict[str, Link] = {
    "nvlink3": Link("NVLink 3", 300e9, "A100 data sheet: 600 GB/s in both directions"),
    "nvlink4": Link("NVLink 4", 450e9, "H100 data sheet: 900 GB/s in both directions"),
    "nvlink5": Link("NVLink 5", 900e9, "HGX B200 data sheet: 1.8 TB/s in both directions"),
    "xgmi3": Link("Infinity Fabric", 448e9, "MI300X data sheet: 7 links of 128 GB/s, both ways"),
    "pcie4": Link("PCIe 4 x16", 31.5e9, "PCI Express 4.0: 16 lanes of 16 GT/s, 128b/130b"),
    "pcie5": Link("PCIe 5 x16", 63e9, "PCI Express 5.0: 16 lanes of 32 GT/s, 128b/130b"),
    "ib-200": Link("200 Gb/s InfiniBand", 25e9, "HDR: 200 Gb/s in each direction"),
    "ib-400": Link("400 Gb/s InfiniBand", 50e9, "NDR: 400 Gb/s in each direction"),
    "ib-800": Link("800 Gb/s InfiniBand", 100e9, "XDR: 800 Gb/s in each direction"),
}

DEVICES: dict[str, Device] = {
    "h100": Device(
        *("H100 SXM", 80e9, 3.35e12, 989.4e12, "nvlink4", 8),
        source="NVIDIA H100 data sheet, SXM column: 1,979 TFLOP/s with sparsity",
        driver_name="NVIDIA H100 80GB HBM3",
    ),
    "h200": Device(
        *("H200 SXM", 141e9, 4.8e12, 989.4e12, "nvlink4", 8),
        source="NVIDIA H200 data sheet: 1,979 TFLOP/s with sparsity",
        driver_name="NVIDIA H200",
    ),
    "a100": Device(
        *("A100 SXM 80GB", 80e9, 2.039e12, 312e12, "nvlink3", 8),
        source="NVIDIA A100 data sheet, 80GB SXM column",
        driver_name="NVIDIA A100-SXM4-80GB",
    ),
    "l40s": Device(
        *("L40S", 48e9, 864e9, 362.05e12, "pcie4", 8),
        source="NVIDIA L40S data sheet: 733 TFLOP/s with sparsity; no NVLink",
        driver_name="NVIDIA L40S",
    ),
    "b200": Device(
        *("B200 SXM", 180e9, 8e12, 2250e12, "nvlink5", 8),
        source="NVIDIA HGX B200 data sheet: 36 PFLOP/s with sparsity and 1.44 TB for eight",
        driver_name="NVIDIA B200",
    ),
    "mi300x": Device(
        *("MI300X", 192e9, 5.3e12, 1307.4e12, "xgmi3", 8),
        source="AMD Instinct MI300X data sheet, matrix bfloat16",
        driver_name="AMD Instinct MI300X",
    ),
    "rtx4090": Device(
        *("RTX 4090", 24e9, 1.008e12, 165.2e12, "pcie4", 8),
        source="NVIDIA Ada architecture paper: float32 sums; eight cards in a node are assumed",
        driver_name="NVIDIA GeForce RTX 4090",
    ),
}


def device_of(name: str) -> Device:
    """The data sheet of that name.

    Raises:
        UnsupportedError: there is none; the message lists those that there are.
    """
    if name not in DEVICES:
        raise UnsupportedError(
            f"device_of: name has value {name!r}, expected one of {sorted(DEVICES)}"
        )
    return DEVICES[name]


def given_device(
    name: str,
    *,
    memory: float,
    bytes_per_second: float,
    flops_per_second: float,
    link: str = "pcie4",
    node: int = 1,
) -> Device:
    """A device whose limits the caller knows, from a data sheet or measured.

    Args:
        name: ``"cpu"`` compares with measured rows of processors.
        memory, bytes_per_second, flops_per_second: above 0 and finite.
        link: a key of `LINKS`, between the devices of a node.
        node: devices of a node, at least 1.

    Raises:
        UnsupportedError: there is no such link.
        ValueError: a number is out of range.
    """
    numbers = {
        "memory": memory,
        "bytes_per_second": bytes_per_second,
        "flops_per_second": flops_per_second,
        "node": node,
    }
    for key, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"given_device: {key} has value {value}, expected above 0 and finite")
    link_of(link)
    driver_name = PROCESSOR if name == PROCESSOR else ""
    limits = (memory, bytes_per_second, flops_per_second)
    return Device(name, *limits, link, node, "as given", driver_name)


def link_of(name: str) -> Link:
    """The link of that name.

    Raises:
        UnsupportedError: there is none; the message lists those that there are.
    """
    if name not in LINKS:
        raise UnsupportedError(f"link_of: name has value {name!r}, expected one of {sorted(LINKS)}")
    return LINKS[name]
