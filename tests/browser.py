"""
Opens a page in a headless Chromium and prints what an expression is worth in it, as JSON.

    pip install PySide6 && python tests/browser.py FILE 'document.title'
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWidgets import QApplication

SETTLE = 1000  # ms, for pictures and sounds to be decoded

app, page = QApplication([]), QWebEnginePage()


def tell(value):
    print(value)
    app.quit()


def ask(loaded):
    assert loaded, "the page did not load"
    expression = f"JSON.stringify({sys.argv[2]})"
    QTimer.singleShot(SETTLE, lambda: page.runJavaScript(expression, tell))


page.loadFinished.connect(ask)
page.load(QUrl.fromLocalFile(str(Path(sys.argv[1]).resolve())))
app.exec()
