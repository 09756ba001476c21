"""Chat templates that take more than their share: one line, in about two seconds."""

import pytest

from common import one_line
from common_bpe import CHATML
from data.foreign import read_template
from data.template import Program

SPECIAL = {"<|im_end|>": 2}


@pytest.mark.parametrize("template", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{% set x = namespace(a='a') %}{% for i in range(99) %}{% set x.a = x.a ~ x.a %}{% endfor %}",
])
def test_a_template_without_end_is_refused(template):
    with pytest.raises(ValueError, match="a chat template takes more than 2 seconds or 512 MiB") as e:
        read_template(template + CHATML, {}, SPECIAL)
    one_line(e.value)


@pytest.mark.parametrize("template", [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ lipsum(3000) }}", "{{ range(10 ** 9) | list }}",
    "{% include 'x' %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for", "{{ 1 / 0 }}",
])
def test_a_template_that_fails_is_left_out(template):
    assert read_template(template + CHATML, {}, SPECIAL) is None


def test_the_process_of_a_template_ends_and_its_error_is_told():
    with Program("{{ raise_exception('not so') if n else n }}", {}) as program:
        assert program(n=0) == "0"
        with pytest.raises(ValueError, match="not so"):
            program(n=1)
        assert program(n=0) == "0"
        program.process.kill()
        program.process.wait()
        with pytest.raises(TimeoutError):
            program(n=0)
