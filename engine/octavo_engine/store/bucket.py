"""Models in S3, or what speaks its protocol: AWS' own client finds the objects and signs their addresses.

transfer.py fetches from these addresses. Credentials, region and endpoint come from where that client takes them: the
environment (AWS_ENDPOINT_URL for other servers), ~/.aws, the machine's or the pod's role.
"""

from __future__ import annotations

import asyncio
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from octavo_engine.errors import ConfigError, ModelNotFound, SourceForbidden, SourceUnreachable, UserError
from octavo_engine.store.remote import MODEL_SUFFIXES, Listing, RemoteFile
from octavo_engine.weights.gguf import part_paths

if TYPE_CHECKING:
    from octavo_engine.store.source import BucketSource

_SIGNED_SECONDS: Final = 12 * 3600  # pull.py asks anew when they are over
_FORBIDDEN: Final = frozenset({"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"})
_ABSENT: Final = frozenset({"404", "NoSuchBucket", "NoSuchKey", "NotFound"})


async def list_bucket(source: BucketSource) -> Listing:
    """Return the objects that `source` means.

    Raises:
        ConfigError: AWS' client is not installed.
        ModelNotFound, SourceForbidden, SourceUnreachable: the server does not give them.
    """
    return await asyncio.to_thread(_list, source)


def _list(source: BucketSource) -> Listing:
    try:
        import boto3  # noqa: PLC0415 - an extra of its own, for who needs it
        from botocore import exceptions  # noqa: PLC0415 - the same
    except ImportError as error:
        raise ConfigError(f"{source.text}: s3:// needs AWS' client: install the extra octavo[s3]") from error
    try:
        s3 = boto3.client("s3")
        objects = _objects(s3, source)
        return Listing(files=tuple(_file(s3, source, key, num_bytes) for key, num_bytes in objects))
    except UserError:
        raise
    except exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code"))
        if code in _FORBIDDEN:
            raise SourceForbidden(f"{source.text}: the server answers {code}; check the AWS credentials") from error
        if code in _ABSENT:
            raise ModelNotFound(f"{source.text} is not there: the server answers {code}") from error
        raise SourceUnreachable(f"{source.text}: {error}") from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise SourceForbidden(f"{source.text}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except (exceptions.BotoCoreError, ValueError) as error:  # a wrong AWS_ENDPOINT_URL is a ValueError
        raise SourceUnreachable(f"{source.text}: {error}") from error


def _objects(s3: Any, source: BucketSource) -> list[tuple[str, int]]:
    """Key and length of each object."""
    if not source.key.endswith("/"):
        keys = [str(part) for part in part_paths(PurePosixPath(source.key))]
        return [(key, s3.head_object(Bucket=source.bucket, Key=key)["ContentLength"]) for key in keys]
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=source.bucket, Prefix=source.key, Delimiter="/")
    found = [
        (entry["Key"], entry["Size"])
        for page in pages
        for entry in page.get("Contents", [])
        if entry["Key"].endswith(MODEL_SUFFIXES)
    ]
    if not found:
        raise ModelNotFound(f"{source.text}: there are no files of a model under this prefix")
    return sorted(found)


def _file(s3: Any, source: BucketSource, key: str, num_bytes: int) -> RemoteFile:
    asked = {"Bucket": source.bucket, "Key": key}
    url = s3.generate_presigned_url("get_object", Params=asked, ExpiresIn=_SIGNED_SECONDS)
    return RemoteFile(name=PurePosixPath(PurePosixPath(key).name), url=url, what=source.text, num_bytes=num_bytes)
