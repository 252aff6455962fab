"""Which release of the Neuron SDK is installed, told by the versions of its packages. Pure functions.

PyTorch/XLA training: torch-neuronx 2.9 and neuronx-distributed, the last of their kind, were released with
SDK 2.27 to 2.31. AWS calls it unsupported from 2.30 on (announcement of May 20, 2026), and at its end of
support as of 2.32 (the archived pages of NxD Training); 2.32.0 was released without torch-neuronx, and 2.33.0
lists that of 2.31 again. The training images ended with 2.30.
"""

import re
from collections.abc import Iterator, Mapping

from tools.preflight.host import Host
from tools.preflight.plan import Finding, Plan

LAST_TO_TRAIN = (2, 31)
# The releases whose packages were looked up: how the version of each package begins (aws-neuron-sdk,
# src/helperscripts/n2-manifest.json of August 2026; 2.33: its page "Release content").
RELEASES = {
    (2, 27): {"neuronx-cc": "2.22.", "torch-neuronx": "2.9.0.2.11.", "libneuronxla": "2.2.14584."},
    (2, 28): {"neuronx-cc": "2.23.", "torch-neuronx": "2.9.0.2.12.", "libneuronxla": "2.2.15515."},
    (2, 29): {"neuronx-cc": "2.24.", "torch-neuronx": "2.9.0.2.13.", "libneuronxla": "2.2.16408."},
    (2, 30): {"neuronx-cc": "2.25.", "torch-neuronx": "2.9.0.2.14.", "libneuronxla": "2.2.16974."},
    (2, 31): {"neuronx-cc": "2.26.", "torch-neuronx": "2.9.0.2.15.", "libneuronxla": "2.2.17544."},
    (2, 32): {"neuronx-cc": "2.27.", "libneuronxla": "3.0.5356."},
    (2, 33): {"neuronx-cc": "2.28.", "libneuronxla": "3.0.10135."},
}
PACKAGES = ("neuronx-cc", "torch-neuronx", "libneuronxla")
INT64_SINCE = (2, 27)  # of neuronx-cc: --native-int64 and --implicit-integer-downcast (its release notes)


def release_of(package: str, version: str) -> tuple[int, int] | None:
    """The SDK with which a version of a package was released, or None where that is not known."""
    for release, beginnings in RELEASES.items():
        if version.startswith(beginnings.get(package, "nothing")):
            return release
    return None


def compiler_version(versions: Mapping[str, str]) -> tuple[int, ...]:
    """The first two numbers of neuronx-cc's version; () where it is not installed."""
    return tuple(map(int, re.findall(r"\d+", versions.get("neuronx-cc", ""))[:2]))


def sdk(host: Host, plan: Plan) -> Iterator[Finding]:
    """The packages are of one SDK, and AWS trains with PyTorch/XLA by it."""
    if not host.on_neuron:
        return
    installed = {
        name: host.versions[name] for name in PACKAGES if name in host.versions.keys() - host.placeholders
    }
    releases = {name: release_of(name, version) for name, version in installed.items()}
    known = {release for release in releases.values() if release}
    text = ", ".join(f"{name} {version}" for name, version in (installed | host.system_packages).items())
    ended = compiler_version(installed) > (2, 26) or any(release > LAST_TO_TRAIN for release in known)
    if ended:
        newest = max(known, default=None)
        named = f"SDK {_name(newest)}" if newest and newest > LAST_TO_TRAIN else "an SDK after 2.31"
        yield Finding(
            "warning",
            f"{named} ({text}): AWS ended the support of PyTorch/XLA training with 2.32",
            "take SDK 2.28 to 2.31: its packages have been released together",
        )
    elif len(known) > 1:
        parts = (
            f"{name} {installed[name]} of {_name(release)}" for name, release in releases.items() if release
        )
        yield Finding(
            "warning",
            f"packages of several SDKs: {', '.join(parts)}",
            'install them together, as AWS\'s page "Release content" lists them',
        )
    elif known:
        yield Finding("ok", f"SDK {_name(*known)}: {text}")
    else:
        yield Finding("ok", f"the SDK is not known by its packages: {text}")


def _name(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


CHECKS = (sdk,)
