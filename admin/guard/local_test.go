package guard

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLocal(t *testing.T) {
	l := NewLocal(LocalOptions{})
	defer l.Close()
	asked := 0
	h := l.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { asked++ }))
	refused := 0
	for _, tc := range []struct {
		name, method, host string
		header             []string
		body               string
		code               int
	}{
		{name: "curl", host: "localhost:15000", code: 200},
		{name: "an address", host: "127.0.0.1:15000", code: 200},
		{name: "an IPv6 address", host: "[::1]:15000", code: 200},
		{name: "no port", host: "LocalHost", code: 200},
		{name: "IPv6 without a port", host: "[::1]", code: 200},
		{name: "a forwarded port", host: "localhost:41234", code: 200},
		{name: "HTTP/1.0", host: "", code: 200},
		{name: "POST by curl", method: "POST", host: "localhost:15000", code: 200},
		{name: "POST by curl -d ''", method: "POST", host: "localhost:15000",
			header: []string{"Content-Type", "application/x-www-form-urlencoded"}, code: 200},
		{name: "a JSON body", method: "POST", host: "localhost:15000", header: []string{"Content-Type", "application/json"},
			body: "{}", code: 200},
		{name: "a rebound name", host: "evil.example:15000", code: 403},
		{name: "a name that begins alike", host: "localhost.evil.example", code: 403},
		{name: "another address of loopback's network", host: "127.0.0.2", code: 403},
		{name: "the node's address", host: "10.0.0.1:15000", code: 403},
		{name: "userinfo", host: "localhost@evil.example", code: 403},
		{name: "the dashboard's own page", host: "localhost:15000", header: []string{"Referer", "http://localhost:15000/",
			"Sec-Fetch-Site", "same-origin"}, code: 200},
		{name: "the address bar", host: "localhost:15000", header: []string{"Sec-Fetch-Site", "none"}, code: 200},
		{name: "our own script", method: "POST", host: "localhost:15000",
			header: []string{"Origin", "http://localhost:15000"}, code: 200},
		{name: "a foreign script", method: "POST", host: "localhost:15000", header: []string{"Origin", "http://evil.example"},
			code: 403},
		{name: "a foreign script that only reads", host: "localhost:15000",
			header: []string{"Origin", "https://evil.example"}, code: 403},
		{name: "a page of another local server", method: "POST", host: "localhost:15000",
			header: []string{"Origin", "http://localhost:3000"}, code: 403},
		{name: "a sandboxed page", method: "POST", host: "localhost:15000", header: []string{"Origin", "null"}, code: 403},
		{name: "two origins", method: "POST", host: "localhost:15000", header: []string{"Origin", "http://localhost:15000",
			"Origin", "http://evil.example"}, code: 403},
		{name: "a foreign image", host: "localhost:15000", header: []string{"Sec-Fetch-Site", "cross-site"}, code: 403},
		{name: "another port of the site", host: "localhost:15000", header: []string{"Sec-Fetch-Site", "same-site"},
			code: 403},
		{name: "an old browser's form", method: "POST", host: "localhost:15000",
			header: []string{"Referer", "http://evil.example/x"}, code: 403},
		{name: "a form without any origin", method: "POST", host: "localhost:15000",
			header: []string{"Content-Type", "application/x-www-form-urlencoded"}, body: "a=b", code: 415},
		{name: "a form of text", method: "POST", host: "localhost:15000",
			header: []string{"Content-Type", "text/plain; charset=UTF-8"}, body: "a=b", code: 415},
		{name: "an upload", method: "POST", host: "localhost:15000",
			header: []string{"Content-Type", "multipart/form-data; boundary=x"}, body: "a=b", code: 415},
	} {
		method := tc.method
		if method == "" {
			method = "GET"
		}
		r := httptest.NewRequest(method, "/x", strings.NewReader(tc.body))
		r.Host = tc.host
		for i := 0; i < len(tc.header); i += 2 {
			r.Header.Add(tc.header[i], tc.header[i+1])
		}
		before := asked
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tc.code || (asked > before) != (tc.code == 200) {
			t.Errorf("%s: %d %q, asked %v; want %d", tc.name, w.Code, w.Body, asked > before, tc.code)
		}
		if tc.code != 200 {
			refused++
		}
	}
	if l.Refused() != uint64(refused) {
		t.Errorf("%d counted, want %d", l.Refused(), refused)
	}
	// A Unix socket is no browser's.
	r := httptest.NewRequest("POST", "http://control/x", nil)
	r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, unixAddr{}))
	w := httptest.NewRecorder()
	if h.ServeHTTP(w, r); w.Code != 200 {
		t.Errorf("by a Unix socket: %d", w.Code)
	}
}

type unixAddr struct{}

func (unixAddr) Network() string { return "unix" }
func (unixAddr) String() string  { return "/x" }

func TestToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	l := NewLocal(LocalOptions{Token: path})
	defer l.Close()
	h := l.Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	ask := func(method, authorization string) (int, string) {
		r := httptest.NewRequest(method, "http://localhost:15000/x", nil)
		if authorization != "" {
			r.Header.Set("Authorization", authorization)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		b, _ := io.ReadAll(w.Body)
		return w.Code, string(b)
	}
	if code, body := ask("POST", "Bearer x"); code != 503 || !strings.Contains(body, path) {
		t.Errorf("without the file: %d %q", code, body)
	}
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range []string{"", " \n", "two lines\nhere", strings.Repeat("x", 5000)} {
		write(bad)
		if code, _ := ask("POST", "Bearer "+strings.TrimSpace(bad)); code != 503 {
			t.Errorf("a token file of %.10q: %d", bad, code)
		}
	}
	write("s3cret\n")
	for authorization, want := range map[string]int{
		"Bearer s3cret": 200, "bearer s3cret": 200, "": 401, "Bearer": 401, "Bearer other": 401, "Basic s3cret": 401,
		"s3cret": 401, "Bearer s3cret2": 401,
	} {
		for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS"} {
			if code, _ := ask(method, authorization); code != want {
				t.Errorf("%s with %q: %d, want %d", method, authorization, code, want)
			}
		}
	}
	if code, _ := ask("GET", ""); code != 200 {
		t.Errorf("reading needs no token: %d", code)
	}
	write("next")
	if code, _ := ask("POST", "Bearer next"); code != 200 {
		t.Errorf("the new token: %d", code)
	}
}
