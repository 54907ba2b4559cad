"""Our import packages have plain names, so nothing else that is installed may use them."""

from importlib import metadata

import pytest

import actors
import environments
import learner
import penstock


@pytest.mark.parametrize("package", [actors, environments, learner, penstock])
def test_no_other_distribution_ships_a_package_of_our_name(package: object) -> None:
    name = package.__name__  # type: ignore[attr-defined]
    others = {
        distribution.metadata["Name"]
        for distribution in metadata.distributions()
        if distribution.metadata["Name"] != "penstock" and name in _top_level_names(distribution)
    }

    assert others == set(), f"{sorted(others)} also ship a top-level package {name!r}; uninstall them"


def _top_level_names(distribution: metadata.Distribution) -> set[str]:
    return {path.parts[0].removesuffix(".py") for path in distribution.files or ()}


def test_the_packages_are_those_of_this_checkout() -> None:
    import_paths = {
        package.__name__: package.__path__ for package in (actors, environments, learner, penstock)
    }

    assert {name: len(list(paths)) for name, paths in import_paths.items()} == dict.fromkeys(import_paths, 1)
