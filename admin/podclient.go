package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
)

// PodClient speaks to a PodSocket. Errors of the server satisfy errors.Is for the ErrPod* values; an
// unreachable server gives an error that says what to look at.
type PodClient struct {
	path string
	http http.Client
}

// NewPodClient makes a client of the socket at path. It connects per request and keeps nothing open.
func NewPodClient(path string) *PodClient {
	c := &PodClient{path: path}
	c.http.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	}
	return c
}

// Add asks for a pod and returns when its traffic is captured. One without addresses gets those of its namespace, if it
// has any.
func (c *PodClient) Add(ctx context.Context, p PodSpec) error {
	if err := p.validate(false); err != nil {
		return err
	}
	return c.do(ctx, http.MethodPost, podsPath, p, nil)
}

// Delete removes a pod and returns when nothing of it is left.
func (c *PodClient) Delete(ctx context.Context, namespace, name string) error {
	return c.do(ctx, http.MethodDelete, podsPath+"/"+url.PathEscape(namespace)+"/"+url.PathEscape(name), nil, nil)
}

// DeleteUID is Delete of the pod that is known by uid.
func (c *PodClient) DeleteUID(ctx context.Context, uid string) error {
	return c.do(ctx, http.MethodDelete, podsPath+"?"+url.Values{"uid": {uid}}.Encode(), nil, nil)
}

// List returns all pods, sorted by namespace and name.
func (c *PodClient) List(ctx context.Context) ([]PodStatus, error) {
	var l podList
	err := c.do(ctx, http.MethodGet, podsPath, nil, &l)
	return l.Pods, err
}

// Connections returns the live connections that q asks for.
func (c *PodClient) Connections(ctx context.Context, q ConnectionQuery) (l Connections, err error) {
	err = c.ask(ctx, connectionsPath, q, &l)
	return l, err
}

// Flows returns the ended connections that q asks for, as far as the daemon remembers them.
func (c *PodClient) Flows(ctx context.Context, q ConnectionQuery) (l Connections, err error) {
	err = c.ask(ctx, flowsPath, q, &l)
	return l, err
}

func (c *PodClient) ask(ctx context.Context, path string, q ConnectionQuery, l *Connections) error {
	if err := q.Validate(); err != nil {
		return err
	}
	return c.do(ctx, http.MethodGet, path+"?"+q.values().Encode(), nil, l)
}

// Get asks for something of the daemon's and gives the answer as it comes. Close it.
func (c *PodClient) Get(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://ztun"+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxReply))
		return nil, replyError(resp.StatusCode, b)
	}
	return resp.Body, nil
}

// maxReply bounds what the client reads: some 10,000 pods.
const maxReply = 16 << 20

func (c *PodClient) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://ztun"+path, body)
	if err != nil {
		return err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return fmt.Errorf("reading from %s: %w", c.path, err)
	}
	if resp.StatusCode/100 != 2 {
		return replyError(resp.StatusCode, b)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("unexpected answer from %s: %w", c.path, err)
	}
	return nil
}

// explain says what to look at when the socket cannot be reached.
func (c *PodClient) explain(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err // without method and invented URL
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("no control socket at %s: is `ztun proxy` running, with the same ZTUN_SOCKET or ZTUN_STATE_DIR? %w",
			c.path, err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("nobody listens on %s: `ztun proxy` has ended without cleaning up? %w", c.path, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("no access to %s: needs root, or the user that runs `ztun proxy`, to whom it belongs: %w",
			c.path, err)
	}
	return fmt.Errorf("control socket %s: %w", c.path, err)
}

// remoteError is the server's text together with what it means here.
type remoteError struct {
	text string
	kind error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.kind }

func replyError(code int, body []byte) error {
	var p podError
	if json.Unmarshal(body, &p) != nil || p.Error == "" {
		p.Error = fmt.Sprintf("unexpected answer: %d %s", code, http.StatusText(code))
	}
	kind := ErrPodInternal
	switch code {
	case http.StatusBadRequest:
		kind = ErrPodInvalid
	case http.StatusNotFound:
		kind = ErrPodNotFound
	case http.StatusConflict:
		kind = ErrPodConflict
	case http.StatusServiceUnavailable:
		kind = ErrPodUnavailable
	case http.StatusGatewayTimeout:
		kind = ErrPodTimeout
	}
	return &remoteError{p.Error, kind}
}
