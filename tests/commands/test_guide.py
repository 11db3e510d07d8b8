"""`pretrain guide`: lists the pages, shows one, and suggests a name for a wrong one."""

import pytest
from rich.console import Console

from pretrain_cli.commands import guide
from pretrain_cli.commands.guide import topics


def test_guide_lists_every_topic_with_one_line(pretrain):
    outcome = pretrain("guide")
    lines = outcome.out.splitlines()
    assert outcome.code == 0
    assert [line.split()[0] for line in lines] == list(topics())
    assert all(len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize("topic", topics())
def test_guide_shows_a_page_as_plain_text_when_piped(pretrain, topic):
    outcome = pretrain(f"guide {topic}")
    assert outcome.code == 0
    assert outcome.out.startswith("# ")
    assert "<!--" not in outcome.out
    assert "\x1b" not in outcome.out


def test_guide_suggests_the_nearest_topic(pretrain):
    outcome = pretrain("guide sampilng")
    assert outcome.code == 2
    assert "no page 'sampilng'; did you mean sampling?" in " ".join(outcome.err.split())


def test_guide_renders_and_pages_on_a_terminal(monkeypatch):
    paged = []
    monkeypatch.setattr(guide.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(guide, "Console", lambda: Console(force_terminal=True, width=80))
    monkeypatch.setattr("rich.pager.SystemPager.show", lambda self, content: paged.append(content))
    guide.guide("speed")
    assert "\x1b[" in paged[0]  # rendered, not the Markdown itself
    assert "Attention backends" in paged[0]
    assert "## " not in paged[0]
