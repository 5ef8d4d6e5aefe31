"""What the installed transformers calls a cache, for tests that give it one or look for it in what comes out."""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))
