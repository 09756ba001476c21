"""A stranger's chat template, run in a process of its own with limits.

Jinja's sandbox keeps a program from the machine, but not from time and memory: loops in
loops, texts that are multiplied. The process has SECONDS of computing and BYTES of
memory. Where it ends early, or a text is longer than LONGEST, the template has failed.
"""

import json
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache

SECONDS, BYTES, LONGEST = 2, 2**29, 2**16


def render(template: str, names: dict, talks: list[dict]) -> list[str | None]:
    """What the template makes of each talk, a dict of its variables; None where it
    fails. `names` are the same for all.
    """
    job = json.dumps({"template": template, "names": names, "talks": talks})
    return run(job) or [None] * len(talks)


@lru_cache(maxsize=64)
def run(job: str) -> list[str | None] | None:
    """What `main` makes of a job in a process of its own; None where that fails."""
    try:
        # its seconds are far more than the limit of computing, for a busy machine
        done = subprocess.run([sys.executable, "-P", __file__], input=job.encode(), capture_output=True,
                              timeout=20 * SECONDS)
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def set_limits() -> None:
    """Of this process, where the system has such limits."""
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def main() -> None:
    """Reads a job from stdin, writes the list of texts to stdout."""
    job = json.load(sys.stdin)
    set_limits()
    import jinja2.ext
    import jinja2.sandbox

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    names = {name: token or "" for name, token in job["names"].items()}
    names |= {"raise_exception": refuse, "tools": None, "documents": None}
    texts = []
    for talk in job["talks"]:
        try:
            text = env.from_string(job["template"]).render(**names, **talk)
        except MemoryError:
            sys.exit(1)
        except Exception:  # its own refusal, or whatever else a stranger's program runs into
            text = None
        texts.append(text if text is not None and len(text) <= LONGEST else None)
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
