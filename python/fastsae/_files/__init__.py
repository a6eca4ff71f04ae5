"""Files that are whole or not there, and that are verified before they are used.

`write` writes them, `read` reads them, `checksum` ties what is read to what was written, and `lock`
keeps two runs out of one folder. Nothing else in the package opens a file for writing.
"""
