"""Between text and tokens: tokenizers and streaming detokenizers."""
