import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drmm_hf.hub.places import command_names_only, names_only


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/jane/data/cells", "cells"),
        ("/home/jane doe/data/my cells/", "my cells"),
        ("C:\\Users\\jane\\cells.json", "cells.json"),
        ("\\\\server7\\jane\\cells", "cells"),
        ("~/cells", "cells"),
        ("~jane/cells", "cells"),
        ("../../jane/cells", "cells"),
        ("./cells", "cells"),
        ("home/jane/cells", "cells"),
        ("/home/jane", "~"),
        ("/Users/jane/", "~"),
        ("/root", "~"),
        ("~jane", "~"),
        ("/", ""),
        ("https://jane:secret@server7.example/data/cells.zip?token=abc", "cells.zip"),
        ("s3://jane-bucket/cells", "cells"),
        ("file:///home/jane/cells", "cells"),
        ("/home/jane/augment.py:mine", "augment.py:mine"),
        # no places
        ("owner/cells", "owner/cells"),
        ("cells", "cells"),
        ("blocks.1", "blocks.1"),
        ("2026-11-28T14:08:50+00:00", "2026-11-28T14:08:50+00:00"),
        ("Linux-6.18.44-x86_64-with-glibc2.36", "Linux-6.18.44-x86_64-with-glibc2.36"),
        ("width / height", "width / height"),
        ("D-RMM on Sparse R-CNN, ResNet-50", "D-RMM on Sparse R-CNN, ResNet-50"),
        ("read from /home/jane/cells, twice", "read from cells, twice"),
    ],
)
def test_places_become_names(place, name):
    assert names_only(place) == name


def test_all_of_a_file_is_reduced_and_nothing_else_changes():
    content = {"a": ["/home/jane/x", 1, None, True, 0.5], "y": {"b": ("owner/z", "../w")}}
    assert names_only(content) == {"a": ["x", 1, None, True, 0.5], "y": {"b": ["owner/z", "w"]}}


def test_commands():
    command = shlex.join(
        [
            "/home/jane/bin/drmm",
            "train",
            "scripts/recipes/cells.yaml",
            "--data",
            "/home/jane doe/cells",
            "--lr",
            "5e-4",
        ]
    )
    command += " --backbone-weights=/home/jane/w.safetensors --init-from owner/cells --betas=0.9,0.99"
    assert command_names_only(command) == (
        "drmm train cells.yaml --data cells --lr 5e-4 --backbone-weights=w.safetensors --init-from owner/cells "
        "--betas=0.9,0.99"
    )


@given(
    st.lists(st.text("abcXYZ019._ -", min_size=1).map(str.strip).filter(lambda x: x.strip("._ ")), max_size=4),
    st.sampled_from(["/home/jane/{}", "C:\\Users\\jane\\{}", "~/../jane/{}", "smb://server7/jane/{}"]),
)
def test_no_user_and_no_host_is_left(parts, form):
    place = form.format("/".join([*parts, "cells"]))
    left = names_only({"x": [place]})["x"][0]
    assert left == "cells"
    assert "jane" not in command_names_only(shlex.join(["drmm", "train", f"--data={place}", "--x", place]))
