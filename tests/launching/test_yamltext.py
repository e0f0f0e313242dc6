"""What PyYAML's safe loader reads from our YAML is what went in, whatever the strings hold."""

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gigatrain.launching import yamltext

_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab :-#\n'\"|>%@`\t!&*?{}[],~=0123e.yn$()", max_size=12)
_LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT
_DATA = st.recursive(_LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4), max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(_DATA, min_size=1, max_size=3))
def test_every_string_comes_back(documents):
    assert list(yaml.safe_load_all(yamltext.text(*documents))) == documents


def test_it_is_read_by_people():
    found = yamltext.text(
        {"command": ["bash", "-c", "set -e\n\necho 'a: b' # c\n"], "on": "yes", "list": [{"a": 1, "b": []}, "1.5", "x:y"]}
    )
    assert (
        found
        == """\
---
command:
  - bash
  - "-c"
  - |
    set -e

    echo 'a: b' # c
"on": "yes"
list:
  - a: 1
    b: []
  - "1.5"
  - x:y
"""
    )
