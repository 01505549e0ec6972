"""The longest files first, so that no worker is left alone with one of them when the others have nothing more to do."""
LONGEST = ("test_runs", "test_methods", "test_explore", "test_kill", "test_probe", "test_processes", "test_benchmark", "test_precision", "test_lab")


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
