"""A result on a page is in a file of results, with its number of seeds and its interval, or says what it is.

What is checked, section by section: every number with decimals and every percentage outside code. It stands in a report
or JSON that the section links (rounded to the digits on the page, or as per cent), or is the sum or difference of two
numbers of its own table row, or is named in a comment that says where it came from:

    <!-- results not in a linked file: 3.39 3.34. From metrics.jsonl of the language models, one run each. -->

The section says how many seeds there are. With fewer than five, it or the page's introduction says that it is a pilot;
with five, the section has an interval (95%).

On README.md and docs/study.md each sentence that states a difference, of a pilot too, has its interval (95%). A
difference is a number with a sign, a number of nats that is lower, higher, better or worse, or one "from 3.38 to 6.15".
What has no interval anywhere is named in a comment that says why:

    <!-- differences without an interval: 3.38 6.15. The report has means of two seeds alone. -->
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": ("Results so far", "A language model that draws"),
    "docs/study.md": (),
    "docs/findings.md": (),
    "docs/demo.md": (),
}
"""Pages of results -> the headings to look under; none for all of the page."""

NOT_RESULTS = re.compile(r"^    .*$|^```.*?^```$|`[^`\n]*`|!?\]\([^)]*\)|<!--.*?-->", re.M | re.S)
RESULT = re.compile(r"(?<![\w.,/-])[-+]?(?:\d[\d,]*\.\d+(?![\w.])|(?!9[05]%)\d+(?=%))")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
LINK = re.compile(r"\]\(([^)#]*\.(?:md|json))(?:#[^)]*)?\)")
NAMED = re.compile(r"<!-- results not in a linked file: ([\d.,\s+-]+)\.\s+From\s+(\S.*?) -->", re.S)
SIGNED = re.compile(r"(?<![\w.,/-])[-+]\d[\d,]*\.\d+")
COMPARED = re.compile(
    r"(?<![\w.,/-])(\d[\d,]*\.\d+) nats[^.;]*? (?:lower|higher|better|worse|less|more)\b"
    r"|\bcosts? (\d[\d,]*\.\d+) nats|\bfrom (\d[\d,]*\.\d+) to (\d[\d,]*\.\d+)(?! *\))"
)
SENTENCE = re.compile(r"(?<=[.:;!?)])\s+(?=[A-Z*\[])|\n\s*\n|\n(?=\s*(?:\d+\.|-|\|) )")
NO_INTERVAL = re.compile(r"<!-- differences without an interval: ([\d.,\s+-]+)\.\s+(\S.*?) -->", re.S)
PAGES_OF_DIFFERENCES = ("README.md", "docs/study.md")
SEEDS = re.compile(r"\b(one|two|three|four|five|\d+)\s(?:\w+\s)?seeds?\b", re.I)
ENOUGH_SEEDS = ("five", "5")
FILES_OF_RESULTS = "study/"


def sections_of(text, headings):
    """Cut a page at its headings of the second level; keep those that are asked for."""
    parts = re.split(r"(?m)^(?=## )", text)
    return [part for part in parts if not headings or part.startswith(tuple(f"## {one}" for one in headings))]


def value_of(number):
    return abs(float(number.replace(",", "")))


def values_in(text):
    return {value_of(number) for number in NUMBER.findall(text) if number.strip("+-,")}


def is_one_of(number, known):
    """Whether a number is one of the known ones, or of them as per cent, rounded to its own digits."""
    reach = 0.5 * 10 ** -len(number.partition(".")[2]) + 1e-9
    return any(abs(one * factor - value_of(number)) <= reach for one in known for factor in (1, 100))


def is_derived(number, row):
    """Whether a number is the sum or difference of two others of its table row."""
    others = [value_of(one) for one in RESULT.findall(row) if one != number]
    return row.startswith("|") and is_one_of(
        number, {abs(a + sign * b) for a in others for b in others for sign in (1, -1) if a != b}
    )


def without_source(section, *, folder):
    """List the results of a section that stand in no file of results that it links."""
    linked = [folder / name for name in LINK.findall(section) if FILES_OF_RESULTS in name]
    known = set().union(*(values_in(path.read_text()) for path in linked if path.is_file()))
    known |= {value for listed, _ in NAMED.findall(section) for value in values_in(listed)}
    return [
        number
        for row in NOT_RESULTS.sub("", section).splitlines()
        for number in RESULT.findall(row)
        if not is_one_of(number, known) and not is_derived(number, row)
    ]


def what_is_missing(section, *, folder, introduction=""):
    """Say what a section's results lack; empty if nothing."""
    text = NOT_RESULTS.sub("", section)
    if not RESULT.search(text):
        return ""
    if strange := without_source(section, folder=folder):
        return f"{', '.join(strange)}: in no report that the section links"
    seeds = SEEDS.findall(text)
    if not seeds:
        return "no number of seeds"
    if any(one.lower() not in ENOUGH_SEEDS for one in seeds):
        return "" if "pilot" in text + introduction else 'fewer than five seeds, and not the word "pilot"'
    return "" if "95%" in text else "no interval (95%)"


def without_interval(section):
    """List the differences of a section whose sentence has no interval (95%)."""
    excused = set().union(*(values_in(listed) for listed, _ in NO_INTERVAL.findall(section)))
    found = []
    for sentence in SENTENCE.split(NOT_RESULTS.sub("", section)):
        if "95%" in sentence or sentence.lstrip().startswith("|"):  # a table's head says what its cells are
            continue
        numbers = SIGNED.findall(sentence) + [
            one for match in COMPARED.findall(sentence) for one in match if one
        ]
        found += [number for number in numbers if value_of(number) not in excused]
    return found


@pytest.mark.parametrize("page", PAGES_OF_DIFFERENCES)
def test_every_difference_has_its_interval_in_its_sentence(page):
    sections = sections_of((ROOT / page).read_text(), PAGES[page])
    assert {one.splitlines()[0]: found for one in sections if (found := without_interval(one))} == {}


@pytest.mark.parametrize(
    ("sentence", "found"),
    [
        ("It ends 0.180 nats per code lower (95%: 0.148 to 0.213, 3 seeds).", []),
        ("It ends 0.180 nats per code lower, in 3 seeds.", ["0.180"]),
        ("Others are +0.08 to +0.10 nats off. The first is -0.18 (95%: -0.21 to -0.15).", ["+0.08", "+0.10"]),
        ("Text is forgotten (from 3.38 to 6.15 nats).", ["3.38", "6.15"]),
        ("These cost 0.433 nats per code.", ["0.433"]),
        ("The loss is 2.86 nats per code under the caption.", []),
        (
            "Text goes from 3.38 to 6.15.\n<!-- differences without an interval: 3.38, 6.15. No report has one. -->",
            [],
        ),
    ],
)
def test_a_difference_without_its_interval_is_named(sentence, found):
    assert without_interval(sentence) == found


@pytest.mark.parametrize("page", PAGES)
def test_every_result_has_its_file_its_seeds_and_its_interval(page):
    path = ROOT / page
    text = path.read_text()
    sections, introduction = sections_of(text, PAGES[page]), text.partition("\n## ")[0]
    assert sections
    missing = {
        one.splitlines()[0]: what_is_missing(one, folder=path.parent, introduction=introduction)
        for one in sections
    }
    assert {head: what for head, what in missing.items() if what} == {}


SECTION = """## Which start
[study/toy/report.md](study/toy/report.md): five seeds. The difference is -0.18 nats (95%: -0.213 to -0.148).

| arm | pre-trained | random | difference |
| --- | --- | --- | --- |
| toy | 4.947 | 5.120 | -0.173 |

Leaks: 91.2%, of these 91% at once. The setting is `lr 1.55`.
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "study" / "toy").mkdir(parents=True)
    (tmp_path / "study" / "toy" / "report.md").write_text(
        "-0.1803 (-0.2130 to -0.1481), 4.9469, -0.1730, 0.9117"
    )
    return tmp_path


def test_a_section_with_all_of_it_passes(folder):
    assert what_is_missing(SECTION, folder=folder) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("-0.18 nats", "-0.19 nats"), "-0.19: in no report"),
        (("5.120", "5.220"), "5.220: in no report"),
        (("91.2%", "92.2%"), "92.2: in no report"),
        (("](study/toy/report.md)", "](study/other/report.md)"), "in no report"),
        (("91% at", "89% at"), "89: in no report"),
        (("five seeds", "many of them"), "no number of seeds"),
        (("five seeds", "three seeds"), 'not the word "pilot"'),
        (("95%", "range"), "no interval"),
    ],
)
def test_a_result_without_its_evidence_is_named(folder, change, said):
    assert said in what_is_missing(SECTION.replace(*change), folder=folder)


def test_what_is_in_no_file_is_named_with_where_it_came_from(folder):
    section = SECTION + "\nA language model has 3.39 nats.\n"
    assert "3.39" in what_is_missing(section, folder=folder)
    source = (
        "<!-- results not in a linked file: 3.39. From metrics.jsonl of the language model, one run. -->\n"
    )
    assert what_is_missing(section + source, folder=folder) == ""
    assert "3.39" in what_is_missing(section + source.replace(" From metrics", ""), folder=folder)
