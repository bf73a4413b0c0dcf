"""
Opens a page in a headless Chromium and prints what an expression is worth in it, as JSON; with a picture's name,
how the page then looks. What the page's console says goes to stderr, and an error in it ends this with 1.

    pip install PySide6 && python tests/browser.py FILE 'document.title' [PICTURE.png [WIDTH [HEIGHT [dark]]]]
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
file, expression, picture, width, height, dark = [*sys.argv[1:], None, None, None, None][:6]
flags = "--no-sandbox --disable-gpu" + " --blink-settings=preferredColorScheme=0" * bool(dark)
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", flags)

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

SETTLE = 1000  # ms, for pictures and sounds to be decoded


class Page(QWebEnginePage):
    broken = False

    def javaScriptConsoleMessage(self, level, message, line, source):
        print(f"console, line {line}: {message}", file=sys.stderr)
        self.broken |= level == QWebEnginePage.JavaScriptConsoleMessageLevel.ErrorMessageLevel


app, view = QApplication([]), QWebEngineView()
page = Page(view)
view.setPage(page)
view.resize(int(width or 1280), int(height or 900))
view.show()


def tell(value):
    print(value)
    QTimer.singleShot(SETTLE if picture else 0, end)


def end():
    if picture:
        view.grab().save(picture)
    app.exit(page.broken)


def ask(loaded):
    assert loaded, "the page did not load"
    QTimer.singleShot(SETTLE, lambda: page.runJavaScript(f"JSON.stringify({expression})", tell))


page.loadFinished.connect(ask)
page.load(QUrl.fromLocalFile(str(Path(file).resolve())))
status = app.exec()
view.setPage(None)
page = None  # before the application
sys.exit(status)
