// Package page is what the pages for people have in common: the node's on 15000 and the one of `ztun control` on 15014.
//
// What flows through it: a template of the page's own and the data of this moment; out come HTML and the headers that
// keep it to itself. Who calls it: admin and admin/control, behind admin/guard. What it never does: know what is shown.
//
// Decisions:
//
//   - 2026-11-28: everything is in one answer, embedded: style, script, icon. No build step, no outside resource, no
//     second path that a port-forward might lose. The script refreshes the parts marked data-live by fetching the
//     same page: what is seen with JavaScript is what is seen without, and nothing is put together from JSON in the
//     browser.
//   - 2026-11-28: the Content-Security-Policy allows the one style and the one script by their hashes, and nothing
//     else: markup that came through after all could neither run nor load nor post anything.
//   - 2026-11-28: names come from peers and the control plane. html/template escapes them; clean shows what would
//     turn text around or hide in it, and bounds it.
//   - 2026-11-28: Referrer-Policy is same-origin: with no-referrer browsers send the forms of the page with "Origin:
//     null", which package guard takes for a foreign page's.
//   - 2026-11-28: one rendering at a time, kept for a second: any number of open pages cost what one does.
package page
