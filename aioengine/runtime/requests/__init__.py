"""Parts of requests: outputs that another engine has begun, and vectors in place of text."""
