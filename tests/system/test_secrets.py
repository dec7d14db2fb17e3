"""Passwords and tokens are masked wherever they stand; everything else stays."""

from __future__ import annotations

import pytest

from evomerge.system.secrets import has_secret, masked, secrets_of

SECRET = "Kx7Autumn"


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://user:{SECRET}@host:5432/db",
        f"postgresql+psycopg://user:a:{SECRET}@host/db",
        f"postgresql://user:a/{SECRET}@b@host/db",
        f"postgresql://host/db?user=u&password={SECRET}",
        f"sqlite:///file:/x.db?uri=true&PASSWORD={SECRET}",
        f"mysql://u@h/d?ssl_key_passphrase={SECRET}&x=1",
        f"https://{SECRET}@host/v1",
        f"https://host/v1?api_key={SECRET}",
        f"https://host/v1?access_token={SECRET}#x",
        f"Authorization: Bearer {SECRET}",
        f"{{'Authorization': 'Bearer {SECRET}'}}",
        f"x-api-key={SECRET}",
        f"dbname=x password='{SECRET}' host=y",
        "hf_" + SECRET + "0123456789",
    ],
)
def test_a_secret_is_masked(text: str) -> None:
    shown = masked(f"error: cannot open {text}: refused")
    assert SECRET not in shown
    assert "***" in shown
    assert shown.startswith("error: cannot open ")
    assert has_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/org/name?revision=main",
        "sqlite:////home/me/study.db",
        "org/name@revision and base+adapter",
        "max_tokens=48, batch_tokens: 4096, eos_token='</s>'",
        "chat template ends a turn with '<|im_end|>' (2)",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert masked(text) == text


def test_secrets_of_a_url_are_masked_alone_too() -> None:
    url = "postgresql://user:p%40ss%20word1@host/db"
    assert "p@ss word1" in secrets_of(url)
    assert masked("login with p@ss word1 failed", url) == "login with *** failed"


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "abcd1234efgh")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-positive")
    assert masked("sent abcd1234efgh, false-positive") == "sent ***, false-positive"
