"""Golden files are compared, or written under `--goldens`."""

import goldens
import pytest


@pytest.fixture
def golden(request):
    """Fails where a text is not the golden one, and shows the difference; `fault` replaces the comparison of texts."""

    def check(path, text: str, fault=goldens.text_fault):
        if request.config.getoption("--goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif found := fault(path, text):
            pytest.fail(f"{path}: {found}\n{goldens.HINT}", pytrace=False)

    return check
