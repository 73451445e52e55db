"""Shards over HTTPS from a server whose certificate only SSL_CERT_FILE vouches for."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from range_server import serve
from samples import random_documents, write_split

# In a process of its own: OpenSSL's defaults are read when aiohttp is imported.
_READ = """
import sys
from data_pipeline import fetch
fetch._FIRST_PAUSE = 0.002
from data_pipeline.fetch import RemoteSettings
from data_pipeline.index import Index
from sisa_dist.config import UserError
try:
    index = Index.load(sys.argv[1], remote=RemoteSettings(retries=2, timeout=20))
    print(sum(int(index.read_member(m).sum()) for m in range(len(index.members))))
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command, to make a certificate")
def test_ssl_cert_file_is_honoured_and_a_stranger_is_refused_at_once(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    local = write_split(tmp_path / "train", random_documents(3, 30))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serve(tmp_path, tls=context) as served:
        assert served.url.startswith("https://")
        clean = {k: v for k, v in os.environ.items() if k not in ("SSL_CERT_FILE", "SSL_CERT_DIR")}
        said = [
            subprocess.run(
                [sys.executable, "-c", _READ, f"{served.url}/train"],
                env=clean | environment, capture_output=True, text=True, timeout=100, check=True,
            ).stdout
            for environment in ({}, {"SSL_CERT_FILE": str(certificate)})
        ]  # fmt: skip
    assert "certificate" in said[0].lower() and "SSL_CERT_FILE" in said[0] and said[0].count("\n") == 1
    assert "tries" not in said[0]  # a certificate does not become right by asking again
    assert said[1].split() == [str(sum(int(local.read_member(m).sum()) for m in range(len(local.members))))]
