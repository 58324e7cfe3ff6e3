"""Links of the repository's Markdown, as the site of docs/ has them."""

import pytest

from tools.site_pages import with_links


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "[Models](docs/models.md#ways-in)", "[Models](models.md#ways-in)"),
        ("docs/tuning.md", "[examples](../examples/README.md)", "[examples](examples.md)"),
        ("docs/tuning.md", "[a card](../examples/tiny.yaml)", "a card (`examples/tiny.yaml`)"),
        ("docs/tuning.md", "[`examples/tiny.yaml`](../examples/tiny.yaml)", "`examples/tiny.yaml`"),
        ("examples/README.md", "[how it was made](tasks/README.md)", "[how it was made](facts.md)"),
        ("README.md", "![exits](docs/pictures/exits.svg)", "![exits](pictures/exits.svg)"),
        ("docs/models.md", "[paper](https://arxiv.org/abs/2402.00518)", "[paper](https://arxiv.org/abs/2402.00518)"),
        ("docs/models.md", "[up](#ways-in)", "[up](#ways-in)"),
        ("docs/models.md", "[gone](../gone.md)", "[gone](../gone.md)"),
    ],
)
def test_links_lead_to_pages(source: str, link: str, expected: str) -> None:
    """A link that works where the repository is read and leads nowhere on the site; a dead one that a rule hides."""
    assert with_links(f"see {link}.", source) == f"see {expected}."
