"""The browser interface: pages about run folders and jobs. It uses Starlette, uvicorn and Jinja2
rather than a widget toolkit, so that the code here decides what every request must fulfil and what
outlives the server."""
