"""The dictionary as pages in a web browser: one set of page code, served or as static files.

`pages` turns records into data for the page code in assets/; `static` writes all of it to a
folder, `server` answers with the same on this machine and takes labels and questions.
"""
