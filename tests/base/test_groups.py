"""Config groups and the files of their options."""

from __future__ import annotations

import pytest

from audiot.base.groups import read_option


def test_an_option_is_its_file_in_plain_dicts():
    found = read_option("attention", "query_key")
    assert found == {
        "defaults": [{"override /positions@_global_.positions": "rotary"}],
        "_target_": "audiot.attention.query_key.QueryKey",
        "dropout": 0.1,
        "share_query_key": False,
    }
    assert type(found["defaults"]) is list
    assert read_option("upstream", "random")["seed"] == "${seed}"  # as it is written


def test_an_unknown_option_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^no positions 'rotery' \(did you mean rotary\?\); there are .*sinusoid$"):
        read_option("positions", "rotery")
    with pytest.raises(ValueError, match=r"no config group 'position' \(did you mean positions\?\)"):
        read_option("position", "rotary")
