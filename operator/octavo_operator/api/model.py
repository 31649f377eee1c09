"""Which model to serve, with what right it is pulled and where it is kept: spec.model. Used by v1alpha1.py."""

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from octavo_operator.api.base import DataKey, Model, ObjectName, Quantity, Rule, matches, quantity_value
from octavo_operator.api.source import SOURCE_RULES

AWS_KEYS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")  # the last one not always

ServedName = Annotated[
    str,
    Field(min_length=1, max_length=128),
    matches(
        "[A-Za-z0-9](?:[-A-Za-z0-9._:/]*[A-Za-z0-9])?",
        "must be letters, digits and - . _ : / with a letter or digit at both ends, such as llama-3.1-8b",
    ),
]


class TokenSecret(Model):
    """A token in a Secret of this namespace."""

    name: ObjectName = Field(description="The Secret's name.")
    key: DataKey = Field(default="token", description="Under which key of the Secret the token is.")


class CredentialsSecret(Model):
    """A Secret of this namespace with the credentials of a bucket or a registry."""

    name: ObjectName = Field(description="The Secret's name.")


class CacheSpec(Model):
    """A volume that keeps the model when pods go."""

    rules: ClassVar = (
        Rule(
            cel="has(self.size) != has(self.claimName)",
            holds=lambda it: (it.size is None) != (it.claim_name is None),
            message="must have either size, for a volume of this service's own, or claimName, for one that is there",
        ),
        Rule(
            cel="!has(self.claimName) || !has(self.storageClassName) && !has(self.accessMode)",
            holds=lambda it: it.claim_name is None or (it.storage_class_name is None and it.access_mode is None),
            message="storageClassName and accessMode are those of the claim that claimName names: leave them out",
        ),
        Rule(
            cel="!has(self.size) || quantity(string(self.size)).isGreaterThan(quantity('0'))",
            holds=lambda it: it.size is None or quantity_value(it.size) > 0,
            message="size must be greater than 0, such as 40Gi",
        ),
    )

    size: Quantity | None = Field(
        default=None, description="Bytes of a volume of this service's own, such as 40Gi; it goes with the service."
    )
    storage_class_name: ObjectName | None = Field(
        default=None, description="The volume's StorageClass. Default: the cluster's. Cannot be changed afterwards."
    )
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] | None = Field(
        default=None,
        description="ReadWriteMany lets several replicas share the volume. Default: ReadWriteOnce, for one replica; "
        "its pod is replaced by ending it first. Cannot be changed afterwards.",
    )
    claim_name: ObjectName | None = Field(
        default=None,
        description="A PersistentVolumeClaim of this namespace, which several services may share. For more than one "
        "replica it must be ReadWriteMany.",
    )

    @property
    def is_for_one_pod(self) -> bool:
        """Whether no second pod can be sure to get the volume."""
        return self.size is not None and self.access_mode != "ReadWriteMany"


# Of what has a source.
SECRET_RULES: Final = (
    Rule(
        cel="!has(self.tokenSecret) || self.source.startsWith('hf://')",
        holds=lambda it: it.token_secret is None or it.source.startswith("hf://"),
        message="tokenSecret is a token for Hugging Face: leave it out, or use an hf:// source",
    ),
    Rule(
        cel="!has(self.credentialsSecret) || self.source.matches('^(?:s3|oci|ollama)://')",
        holds=lambda it: it.credentials_secret is None or it.source.startswith(("s3://", "oci://", "ollama://")),
        message="credentialsSecret is for s3://, oci:// and ollama:// sources: leave it out; the token for an "
        "hf:// source goes into tokenSecret",
    ),
)
# Of what has a name beside the model's own.
NOT_LATEST: Final = Rule(
    cel="!self.name.endsWith(':latest')",
    holds=lambda it: not it.name.endswith(":latest"),
    message="name must not end in :latest, which clients may add to any name: leave it out",
)


class ModelSpec(Model):
    """Which model to serve."""

    rules: ClassVar = (
        *SECRET_RULES,
        Rule(
            cel="!has(self.cache) || !self.source.startsWith('pvc://')",
            holds=lambda it: it.cache is None or not it.source.startswith("pvc://"),
            message="a pvc:// source is in a volume already: leave cache out",
        ),
    )

    source: Annotated[str, Field(min_length=1, max_length=1024), *SOURCE_RULES] = Field(
        description="Where the model is: pvc://CLAIM/PATH/FILE.gguf or pvc://CLAIM/FOLDER/ (a PersistentVolumeClaim of "
        "this namespace, mounted read-only), hf://ORG/REPO[@REVISION][:FILE.gguf|:QUANTISATION|:PATTERNS] (Hugging "
        "Face), https://HOST/PATH/FILE.gguf or http://, s3://BUCKET/PATH/FILE.gguf or s3://BUCKET/PREFIX/, "
        "oci://HOST/REPOSITORY[:TAG|@DIGEST] or ollama://[HOST/][NAMESPACE/]MODEL[:TAG]. Each pod pulls what is remote "
        "before it starts."
    )
    name: ServedName | None = Field(
        default=None, description="The name by which clients ask for the model. Default: metadata.name."
    )
    token_secret: TokenSecret | None = Field(
        default=None, description="The token with which the model is pulled from Hugging Face, if it wants one."
    )
    credentials_secret: CredentialsSecret | None = Field(
        default=None,
        description="A Secret with what a bucket or a registry wants. For s3:// its keys are AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY and, where one is needed, AWS_SESSION_TOKEN; region and endpoint go into pod.env. For "
        "oci:// and ollama:// its type is kubernetes.io/dockerconfigjson, as `kubectl create secret docker-registry` "
        "makes it.",
    )
    cache: CacheSpec | None = Field(
        default=None,
        description="Keeps the pulled model when pods go. Default: every pod pulls it anew to the node's disk. A model "
        "that is there is never pulled again: to get a new one, name another revision, tag or path.",
    )
