"""An HTTP server with OpenAI's API over one :class:`fastdllm_ext.Engine`: ``fastdllm-ext serve``.

docs/serving.md says what it takes. Importing this imports no web framework.
"""

NEEDS = "serving needs FastAPI, uvicorn and prometheus-client: pip install 'fastdllm_ext[serve]'"
