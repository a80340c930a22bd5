"""The code that is published: what a model needs and no more, short, of torch and transformers alone."""

import ast
import io
import sys
import tokenize

import pytest
from tiny import tiny_model, tiny_sjea

from trainers.publishing import AUTO_MAPS, code_files, save_model

MODELS = {"cjepa": tiny_model, "sjea": tiny_sjea}
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def num_code_lines(text: str) -> int:
    """Lines without blank ones, comments and docstrings."""
    documentation = set()
    for node in ast.walk(ast.parse(text)):
        first = getattr(node, "body", [None])[0] if isinstance(getattr(node, "body", None), list) else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            documentation |= set(range(first.lineno, first.end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


def test_lines_of_code_are_counted():
    assert (
        num_code_lines('"""One\ntwo."""\n\nx = 1  # note\n\n\ndef f():\n    """Three."""\n    return """a\nb"""\n')
        == 4
    )


@pytest.mark.parametrize("model_type", AUTO_MAPS)
def test_the_code_is_short_and_imports_torch_and_transformers_alone(model_type):
    texts = [path.read_text() for path in code_files(model_type)]
    assert sum(map(num_code_lines, texts)) < 1500
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                assert name.partition(".")[0] in {"torch", "transformers"} | sys.stdlib_module_names, name


@pytest.mark.parametrize("model_type", AUTO_MAPS)
def test_a_folder_holds_the_code_of_its_own_kind(model_type, tmp_path):
    save_model(MODELS[model_type](), None, tmp_path)
    published = {path.name: path.read_bytes() for path in tmp_path.glob("*.py")}
    assert published == {path.name: path.read_bytes() for path in code_files(model_type)}
    assert any("sjea" in name for name in published) == (model_type == "sjea")
    assert ("backbone_cjepa.py" in published) == (model_type == "cjepa")
