// Package browser looks at the pages for people with a real browser: Debian's chromium, headless, over the DevTools
// protocol. It is a module of its own, so that the main go.mod stays lean. Without chromium it fails: .ci/run
// installs it.
//
// ZTUN_SHOTS=DIR keeps a picture of each page, light and dark, wide and narrow.
package browser
