"""Text to tokens to batches.

data = prepare(DataConfig(text=("corpus:bible",)), "prepared")
batch = WindowSampler(data.train.tokens, seq_len=256, batch_size=8, seed=0).batch(0)
batch.input_ids, batch.labels
"""

from blackmamba.data.build import join_parts, prepare_shards
from blackmamba.data.chat import ChatTemplate, Message
from blackmamba.data.config import DataConfig, ShardConfig, SourceConfig
from blackmamba.data.conversations import ChatData, prepare_conversations
from blackmamba.data.mixture import MixtureData, MixtureSampler, Share
from blackmamba.data.packing import Batch, Packing, PackingKind, Window
from blackmamba.data.prepare import PreparedData, open_prepared, prepare
from blackmamba.data.sampler import ValidationStreams, WindowSampler
from blackmamba.data.shards import ShardedData
from blackmamba.data.text import iter_documents
from blackmamba.data.token_log import TokenLog, read_token_log
from blackmamba.data.tokenizer import Tokenizer
from blackmamba.data.tokens import TokenFile

__all__ = [
    "Batch",
    "ChatData",
    "ChatTemplate",
    "DataConfig",
    "Message",
    "MixtureData",
    "MixtureSampler",
    "Packing",
    "PackingKind",
    "PreparedData",
    "ShardConfig",
    "ShardedData",
    "Share",
    "SourceConfig",
    "TokenFile",
    "TokenLog",
    "Tokenizer",
    "ValidationStreams",
    "Window",
    "WindowSampler",
    "iter_documents",
    "join_parts",
    "open_prepared",
    "prepare",
    "prepare_conversations",
    "prepare_shards",
    "read_token_log",
]
