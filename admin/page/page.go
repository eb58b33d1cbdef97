package page

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"strings"
	"sync"
	"time"

	"ztun/admin/words"
)

//go:embed layout.html
var layout string

//go:embed page.css
var style string

//go:embed page.js
var script string

// Page is one page. Its handler may be called at any time.
type Page struct {
	t      *template.Template
	data   func() any
	header http.Header

	mu   sync.Mutex // held while it is rendered
	body []byte
	made time.Time
}

// fresh is how long a rendering is good for.
const fresh = time.Second

// New makes a page of a template that defines "title", "status" (beside the title, in the head), "nav" (list items)
// and "main". data is called for each rendering, by one caller at a time.
func New(text string, data func() any) (*Page, error) {
	t, err := template.New("layout").Funcs(functions()).Parse(layout)
	if err == nil {
		_, err = t.Parse(text)
	}
	if err != nil {
		return nil, fmt.Errorf("template of a page: %w", err)
	}
	return &Page{t: t, data: data, header: http.Header{
		"Content-Type": {"text/html; charset=utf-8"},
		"Content-Security-Policy": {
			fmt.Sprintf("default-src 'none'; style-src '%s'; script-src '%s'; img-src data:; connect-src 'self'; "+
				"form-action 'self'; base-uri 'none'; frame-ancestors 'none'", sourceHash(style), sourceHash(script))},
		"X-Content-Type-Options":       {"nosniff"},
		"X-Frame-Options":              {"DENY"},
		"Referrer-Policy":              {"same-origin"},
		"Cross-Origin-Resource-Policy": {"same-origin"},
		"Cross-Origin-Opener-Policy":   {"same-origin"},
		"Cache-Control":                {"no-store"},
	}}, nil
}

func sourceHash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// ServeHTTP answers any method, as ztunnel does at /.
func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := p.render()
	if err != nil {
		http.Error(w, "the page cannot be shown: "+err.Error(), http.StatusInternalServerError)
		return
	}
	for name, v := range p.header {
		w.Header()[name] = v
	}
	if r.Method != http.MethodHead {
		w.Write(body)
	}
}

func (p *Page) render() ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.body != nil && time.Since(p.made) < fresh {
		return p.body, nil
	}
	var b bytes.Buffer
	if err := p.t.Execute(&b, p.data()); err != nil {
		return nil, err
	}
	p.body, p.made = b.Bytes(), time.Now()
	return p.body, nil
}

func functions() template.FuncMap {
	return template.FuncMap{
		"style":  func() template.CSS { return template.CSS(style) },
		"script": func() template.JS { return template.JS(script) },
		"clean":  clean, "ago": ago, "span": words.Span, "until": until, "stamp": stamp, "bytes": amount, "count": count,
		"rate": rate, "spark": spark,
		"lower": strings.ToLower,
	}
}
