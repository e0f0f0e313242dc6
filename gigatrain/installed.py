"""Which versions decide numbers and speed here. Read from the packages' metadata: nothing is imported, which a broken driver may hang."""

from importlib import metadata
from platform import python_version


def versions(*names: str) -> dict[str, str]:
    """Of Python, and of those distributions of these names that are installed; no environment, no paths."""
    found = {"python": python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
