"""OpenAI's ``/v1/responses``, without state: nothing is kept from one request to the next."""
