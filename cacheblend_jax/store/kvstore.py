"""How TensorStore finds a pack's arrays: in files, or on object storage."""

from __future__ import annotations

import os
from typing import Any

from cacheblend_jax.store.places import is_local

KvStoreSpec = str | dict[str, Any]


def base_spec(pack: str | os.PathLike[str]) -> KvStoreSpec:
    """Returns TensorStore's spec of the key-value store that holds a pack's `state/`."""
    if is_local(pack):
        return {"driver": "file", "path": f"{os.path.abspath(pack)}/state/"}
    url = f"{os.fspath(pack)}/state/"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url.startswith("s3://") or not endpoint:
        return url
    # Other S3 clients learn of a server that is not Amazon's from the environment; TensorStore only from its spec.
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"driver": "s3", "bucket": bucket, "path": prefix, "endpoint": endpoint, "aws_region": region}
