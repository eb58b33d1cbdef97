package main

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"ztun/admin/istiod"
	"ztun/proxy/ports"
)

// Where ztunnel's chart mounts what the control plane asks for; relative to the working directory.
const (
	defaultRoots = "./var/run/secrets/istio/root-cert.pem"
	defaultToken = "./var/run/secrets/tokens/istio-token"
)

// parseRoots reads XDS_ROOT_CA and CA_ROOT_CA, who may certify a server of the control plane: a file that exists,
// SYSTEM, or PEM text. ztunnel takes any other text for PEM without certificates, and then trusts nobody; here only
// the default may be missing.
func parseRoots(v string) (istiod.Roots, error) {
	switch info, err := os.Stat(v); {
	case v == "SYSTEM":
		return istiod.Roots{System: true}, nil
	case strings.Contains(v, "-----BEGIN CERTIFICATE-----"):
		return istiod.Roots{PEM: []byte(v)}, nil
	case err == nil && info.IsDir():
		return istiod.Roots{}, errors.New("a directory; name the file in it")
	case err == nil:
		return istiod.Roots{File: v}, nil
	case v == defaultRoots:
		return istiod.Roots{}, nil
	}
	return istiod.Roots{}, errors.New("neither a file that exists, nor SYSTEM, nor a certificate in PEM")
}

func roots(p *istiod.Roots) func(string) error {
	return func(v string) (err error) { *p, err = parseRoots(v); return err }
}

// setToken reads AUTH_TOKEN: a file that exists, else the token itself. "" is no token.
func (l *loader) setToken(v string) error {
	if info, err := os.Stat(v); err == nil {
		if info.IsDir() {
			return errors.New("a directory; name the file in it")
		}
		l.c.Control.Token.File = v
		return nil
	}
	if !l.given("AUTH_TOKEN") {
		return nil // the default, which is not there
	}
	v = strings.TrimRight(v, " \t\r\n")
	if !isHeaderValue(v) {
		return errors.New("no file of this name, and not a token either: it has characters that a header cannot carry")
	}
	if strings.HasPrefix(v, "/") || strings.HasPrefix(v, "./") {
		l.c.warn("AUTH_TOKEN looks like a path, but there is no such file: it is used as the token itself")
	}
	l.c.Control.Token.Literal = v
	return nil
}

// parseAddress checks the URI of a control plane and gives it a scheme; "" is none.
func parseAddress(v string) (string, error) {
	if v == "" {
		return "", nil
	}
	if !strings.Contains(v, "://") {
		v = "https://" + v
	}
	u, err := url.Parse(v)
	var ue *url.Error
	switch {
	case errors.As(err, &ue):
		return "", fmt.Errorf("not a URI: %w", ue.Err)
	case err != nil:
		return "", err
	case u.Scheme == "http":
		return "", errors.New("a control plane is spoken to over TLS only: write https:// and istiod's TLS port, 15012")
	case u.Scheme != "https":
		return "", fmt.Errorf("the scheme is https, not %s", u.Scheme)
	case u.Hostname() == "":
		return "", errors.New("names no host")
	case u.User != nil, u.Path != "" && u.Path != "/", u.RawQuery != "", u.Fragment != "":
		return "", errors.New("only a host and a port are wanted, as in istiod.istio-system.svc:15012")
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return "", fmt.Errorf("%s is no port", p)
		}
	}
	return v, nil
}

// ownHeader reports names that HTTP/2 and gRPC have their own use for; gRPC drops them without a word.
func ownHeader(key string) bool {
	switch key {
	case "connection", "content-type", "host", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade",
		"user-agent":
		return true
	}
	return strings.HasPrefix(key, "grpc-") || strings.HasSuffix(key, "-bin")
}

// header adds one XDS_HEADER_<key> or CA_HEADER_<key> to the metadata of each call.
func header(p *[][2]string) func(key, value string) error {
	return func(key, value string) error {
		key = strings.ToLower(key)
		allowed := func(r rune) bool {
			return r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.'
		}
		switch {
		case key == "" || strings.ContainsFunc(key, func(r rune) bool { return !allowed(r) }):
			return errors.New("the part after HEADER_ is no name of gRPC metadata: letters, digits, - _ and . only")
		case ownHeader(key):
			return errors.New("HTTP and gRPC keep this name for themselves (host, te, user-agent and the like, grpc-..., " +
				"...-bin)")
		case !isHeaderValue(value):
			return errors.New("the value has characters that a header cannot carry")
		}
		*p = append(*p, [2]string{key, value})
		return nil
	}
}

func isHeaderValue(v string) bool {
	return !strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r > '~' })
}

// parseDNSAddress reads DNS_PROXY_ADDR: localhost:PORT, which is both loopback addresses, or IP:PORT.
func parseDNSAddress(v string) (string, error) {
	if port, ok := strings.CutPrefix(v, "localhost:"); ok {
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return "", fmt.Errorf("%q is no port", port)
		}
		return v, nil
	}
	a, err := netip.ParseAddrPort(v)
	if err != nil {
		return "", errors.New("want localhost:PORT or IP:PORT")
	}
	return a.String(), nil
}

// credentials applies ZTUN_CONTROL_CREDENTIALS, a directory that `ztun control join` has written, where no
// variable of its own says otherwise.
func (c *Config) credentials(l *loader) error {
	if c.Control.Dir == "" {
		return nil
	}
	file := func(name string) string {
		path := filepath.Join(c.Control.Dir, name)
		if _, err := os.Stat(path); err != nil {
			return ""
		}
		return path
	}
	root, token, cert, key := file("root-cert.pem"), file("token"), file("cert-chain.pem"), file("key.pem")
	switch {
	case root == "":
		return errors.New("it has no root-cert.pem; `ztun control join` makes such a directory")
	case (cert == "") != (key == ""):
		return errors.New("it has only one of cert-chain.pem and key.pem")
	case token == "" && cert == "":
		return errors.New("it has neither a token nor cert-chain.pem and key.pem: the control plane would not know us")
	}
	if !l.given("XDS_ROOT_CA") {
		c.XDS.Roots = istiod.Roots{File: root}
	}
	if !l.given("CA_ROOT_CA") {
		c.CA.Roots = istiod.Roots{File: root}
	}
	if !l.given("AUTH_TOKEN") {
		c.Control.Token.File, c.Control.Token.Literal = token, ""
	}
	if !l.given("ZTUN_CONTROL_CERT") && !l.given("ZTUN_CONTROL_KEY") {
		c.Control.Cert, c.Control.Key = cert, key
	}
	return nil
}

// deliberate refuses a configuration in which nothing says that this host is to be a node of a mesh: neither its
// name, nor where workloads come from. Whoever tries what `ztun proxy` does must not find rules and forwarding
// changed after it.
func (c *Config) deliberate() error {
	if c.Node.Name == "" && c.XDS.guessed {
		return &configError{"NODE_NAME", "",
			errors.New("nothing is configured, and this host is left as it is: name this node here, " +
				"and a source of workloads in XDS_ADDRESS or LOCAL_XDS_PATH; ztun proxy --help has all variables")}
	}
	return nil
}

// sources decides where workloads and certificates come from (spec controlplane 1.2: XDS_ADDRESS,
// CA_ADDRESS and their defaults; LOCAL_CA_DIR is ours).
func (c *Config) sources(l *loader) error {
	istiod := fmt.Sprint("https://localhost:", ports.XDS)
	if l.kubernetes {
		istiod = fmt.Sprint("https://istiod.istio-system.svc:", ports.XDS)
	}
	var err error
	switch {
	case l.xds != nil:
		c.XDS.Address = *l.xds // "" is off
	case l.proxy.DiscoveryAddress != nil:
		if c.XDS.Address, err = parseAddress(*l.proxy.DiscoveryAddress); err != nil {
			return &configError{l.discoveryFrom, "discoveryAddress: " + *l.proxy.DiscoveryAddress, err}
		}
	default:
		c.XDS.Address = istiod
		c.XDS.guessed = !l.kubernetes && c.XDS.LocalInline == "" && c.XDS.LocalPath == ""
	}
	switch {
	case c.XDS.LocalInline != "" && c.XDS.LocalPath != "":
		return &configError{"LOCAL_XDS", "...", errors.New("LOCAL_XDS_PATH is set as well; only one of them may be")}
	case c.XDS.Address == "" && c.XDS.LocalInline == "" && c.XDS.LocalPath == "":
		return &configError{"XDS_ADDRESS", "",
			errors.New("no source of workloads: name a control plane here, or a workload file in LOCAL_XDS_PATH")}
	case c.CA.Fake && c.CA.LocalDir != "":
		return &configError{"FAKE_CA", "true", errors.New("LOCAL_CA_DIR is set as well; only one of them may be")}
	case c.CA.Fake: // CA_ADDRESS is not read, as in ztunnel
	case c.CA.LocalDir != "" && l.ca != nil && *l.ca != "":
		return &configError{"LOCAL_CA_DIR", c.CA.LocalDir, errors.New("CA_ADDRESS is set as well; only one of them may be")}
	case c.CA.LocalDir != "":
	case l.ca == nil:
		c.CA.Address = istiod
	case *l.ca == "":
		return &configError{"CA_ADDRESS", "",
			errors.New("no source of certificates: name a CA here; or run `ztun ca init DIR` and name DIR in LOCAL_CA_DIR; or " +
				"set FAKE_CA=true for a test")}
	default:
		c.CA.Address = *l.ca
	}
	if !isHeaderValue(c.Node.ClusterID) {
		return &configError{"CLUSTER_ID", c.Node.ClusterID,
			errors.New("it goes into a header of each call to the control plane, which cannot carry these characters")}
	}
	if err := c.credentials(l); err != nil {
		return &configError{"ZTUN_CONTROL_CREDENTIALS", c.Control.Dir, err}
	}
	if (c.Control.Cert == "") != (c.Control.Key == "") {
		return &configError{"ZTUN_CONTROL_CERT", c.Control.Cert,
			errors.New("ZTUN_CONTROL_CERT and ZTUN_CONTROL_KEY go together")}
	}
	for _, s := range []struct {
		name string
		upstream
	}{{"XDS_ROOT_CA", c.XDS.upstream}, {"CA_ROOT_CA", c.CA.upstream}} {
		if s.Address != "" && s.Roots.File == "" && s.Roots.PEM == nil && !s.Roots.System {
			c.warn("%s is not set and %s does not exist: no server at %s will be trusted", s.name, defaultRoots, s.Address)
		}
	}
	return nil
}
