"""OpenAI's ``/v1/responses``, stateless: nothing is kept between requests."""
