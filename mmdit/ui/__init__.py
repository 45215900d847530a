"""The browser interface: pages over run folders and jobs. Starlette, uvicorn and Jinja2 rather than
a toolkit of widgets: what is asked of each request and what outlives the server is written here."""
