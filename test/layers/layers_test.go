// Package layers holds the test of who may import whom (design section 4).
package layers

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// allowed is the whole drawing: package, and the packages of ours that it imports. A new arrow is a
// decision: draw it here, and say why in the package's doc.go.
const allowed = `
admin                -> admin/guard admin/page admin/suggest proxy/fair proxy/rescue proxy/state
admin/agent          -> admin/zds
admin/backoff        ->
admin/ca             -> admin/istiod admin/pb/citadelpb admin/watch proxy/identity tun/replace
admin/control        -> admin/ca admin/guard admin/page admin/pb/citadelpb admin/pb/discoverypb admin/pb/securitypb admin/pb/workloadpb admin/watch admin/words admin/xds proxy/fair proxy/identity proxy/rbac proxy/state tun/replace
admin/fdstore        ->
admin/guard          -> proxy/fair
admin/istiod         -> proxy/identity
admin/page           -> admin/words
admin/pb             ->
admin/pb/citadelpb   ->
admin/pb/discoverypb ->
admin/pb/securitypb  ->
admin/pb/workloadpb  ->
admin/pb/zdspb       ->
admin/suggest        ->
admin/watch          ->
admin/words          ->
admin/xds            -> admin/backoff admin/pb/discoverypb admin/pb/securitypb admin/pb/workloadpb admin/suggest admin/watch proxy/fair proxy/rbac proxy/rescue proxy/state
admin/zds            -> admin/backoff admin/pb/zdspb
admin/zlog           -> admin/suggest
cmd/agentcmd         ->
cmd/attach           -> admin admin/fdstore netstack netstack/usersock proxy proxy/fair proxy/ports proxy/refusal proxy/rescue tun tun/netns tun/steer
cmd/attach/attachtest -> admin cmd/attach netstack proxy proxy/refusal tun tun/tuntest
cmd/attach/isolated  -> admin cmd/attach netstack proxy/ports tun tun/netns tun/replace tun/steer
cmd/attach/redirected -> admin cmd/attach netstack proxy proxy/ports tun tun/netns
cmd/attach/dedicated -> admin cmd/attach netstack proxy proxy/ports tun
cmd/attach/rootless  -> admin cmd/attach netstack/usersock proxy proxy/ports tun tun/netns tun/steer
cmd/attach/steered   -> admin cmd/attach netstack proxy proxy/ports tun tun/netns tun/sandwich
cmd/cni              -> admin/watch tun/replace
cmd/supervise        -> admin/fdstore admin/zlog
cmd/doctor           -> tun/netns tun/sandwich tun/steer
cmd/ztun             -> admin admin/ca admin/control admin/fdstore admin/guard admin/istiod admin/suggest admin/watch admin/words admin/xds admin/zds admin/zlog cmd/agentcmd cmd/attach cmd/attach/dedicated cmd/attach/isolated cmd/attach/redirected cmd/attach/rootless cmd/attach/steered cmd/cni cmd/doctor cmd/supervise netstack proxy proxy/dns proxy/fair proxy/hbone proxy/identity proxy/ports proxy/refusal proxy/rescue proxy/resolve proxy/state tun tun/capture tun/netns tun/replace
cmd/ztun-agent       -> admin/agent admin/guard admin/zds admin/zlog cmd/agentcmd cmd/cni
netstack             -> proxy/fair proxy/grow proxy/ports proxy/refusal proxy/rescue tun
netstack/usersock    -> proxy/fair proxy/rescue
proxy                -> proxy/brief proxy/fair proxy/grow proxy/hbone proxy/identity proxy/ports proxy/rbac proxy/refusal proxy/rescue proxy/route proxy/socks proxy/state
proxy/brief          -> proxy/rescue
proxy/dns            -> proxy/fair proxy/rescue proxy/state
proxy/fair           ->
proxy/grow           ->
proxy/hbone          -> proxy/fair proxy/grow proxy/identity proxy/rescue
proxy/identity       ->
proxy/ports          ->
proxy/rbac           -> proxy/identity
proxy/refusal        ->
proxy/rescue         -> proxy/fair
proxy/resolve        ->
proxy/route          -> proxy/identity proxy/ports proxy/state
proxy/socks          ->
proxy/state          -> proxy/identity proxy/rbac
tun                  -> tun/netns
tun/capture          ->
tun/netns            ->
tun/replace          ->
tun/rtnl             -> tun/netns
tun/sandwich         -> proxy/ports tun/netns tun/replace tun/rtnl
tun/steer            -> proxy/ports tun/netns tun/rtnl
tun/tuntest          -> tun
tun/tuntest/nslab    -> tun/netns
`

// doors are the dependencies, all of them, and the only trees that may open them.
var doors = map[string][]string{
	"github.com/cespare/xxhash/v2":        {"admin/control"},
	"github.com/containernetworking/cni":  {"cmd/cni"},
	"github.com/fsnotify/fsnotify":        {"admin", "cmd/cni"},
	"github.com/klauspost/compress":       {"admin"},
	"github.com/miekg/dns":                {"proxy/dns"},
	"github.com/prometheus/client_golang": {"admin", "cmd", "proxy"},
	"github.com/prometheus/client_model":  {"admin", "proxy"},
	"github.com/prometheus/common":        {"admin"},
	"github.com/spf13/cobra":              {"cmd"},
	"github.com/spf13/pflag":              {"cmd"},
	"github.com/vishvananda/netlink":      {"tun"},
	"go.yaml.in/yaml/v3":                  {"admin", "cmd"},
	"golang.org/x/crypto":                 {"proxy/identity"},
	"golang.org/x/net":                    {"cmd/doctor", "proxy"},
	"golang.org/x/sys":                    {"admin", "cmd", "netstack", "proxy/hbone", "tun"},
	"golang.zx2c4.com/wireguard":          {"tun"},
	"google.golang.org/grpc":              {"admin"},
	"google.golang.org/protobuf":          {"admin", "proxy"},
	"gvisor.dev/gvisor":                   {"netstack"},
	"k8s.io/api":                          {"cmd/ztun-agent"},
	"k8s.io/apimachinery":                 {"cmd/ztun-agent"},
	"k8s.io/client-go":                    {"cmd/ztun-agent"},
	"k8s.io/klog":                         {"cmd/ztun-agent"},
}

type pkg struct {
	ImportPath, Name, Dir string
	GoFiles, Imports      []string
}

func TestImports(t *testing.T) {
	want := map[string][]string{}
	for _, line := range strings.Split(strings.TrimSpace(allowed), "\n") {
		from, to, ok := strings.Cut(line, "->")
		if !ok {
			t.Fatalf("no arrow in %q", line)
		}
		want[strings.TrimSpace(from)] = strings.Fields(to)
	}
	got := map[string][]string{}
	for _, p := range list(t) {
		name := strings.TrimPrefix(p.ImportPath, "ztun/")
		if strings.HasPrefix(name, "test/") || strings.HasPrefix(name, "scripts/") || strings.Contains(name, "/internal/") {
			continue
		}
		arrows := []string{}
		for _, i := range p.Imports {
			if ours, ok := strings.CutPrefix(i, "ztun/"); ok && !strings.Contains(ours, "/internal/") {
				arrows = append(arrows, ours)
			}
			first, _, _ := strings.Cut(i, "/")
			known := !strings.Contains(first, ".")
			for door, trees := range doors {
				if i != door && !strings.HasPrefix(i, door+"/") {
					continue
				}
				known = true
				if !slices.ContainsFunc(trees, func(tree string) bool {
					return name == tree || strings.HasPrefix(name, tree+"/")
				}) {
					t.Errorf("%s imports %s, whose only door is %s", name, i, strings.Join(trees, ", "))
				}
			}
			if !known {
				t.Errorf("%s imports %s, which has no door", name, i)
			}
		}
		slices.Sort(arrows)
		got[name] = arrows
	}
	for name, arrows := range got {
		if w, ok := want[name]; !ok {
			t.Errorf("package %s -> %s is not in the drawing", name, strings.Join(arrows, " "))
		} else if !slices.Equal(w, arrows) {
			t.Errorf("%s -> %s, drawn is -> %s", name, strings.Join(arrows, " "), strings.Join(w, " "))
		}
	}
	for name := range want {
		if _, ok := got[name]; !ok {
			t.Errorf("package %s is drawn but does not exist", name)
		}
	}
}

// The folders at the top are these, so that a newcomer finds the floors of the house: a new package goes into one of
// them. And no program that somebody built lies about in the repository.
func TestTopLevel(t *testing.T) {
	folders := []string{"admin", "cmd", "netstack", "proxy", "scripts", "test", "tun"}
	for _, p := range list(t) {
		top, _, _ := strings.Cut(strings.TrimPrefix(p.ImportPath, "ztun/"), "/")
		if !slices.Contains(folders, top) {
			t.Errorf("%s: packages go into one of %s", p.ImportPath, strings.Join(folders, ", "))
		}
	}
	tracked := exec.Command("git", "ls-files", "-z")
	tracked.Dir = "../.."
	out, err := tracked.Output()
	if err != nil {
		t.Logf("what is in the repository cannot be listed: %v", err) // an unpacked archive
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		f, err := os.Open(filepath.Join("../..", name))
		if err != nil {
			continue // deleted, and not yet committed so
		}
		var magic [4]byte
		if n, _ := io.ReadFull(f, magic[:]); string(magic[:n]) == "\x7fELF" {
			t.Errorf("%s is a program", name)
		}
		f.Close()
	}
}

// Every package says at one place what it is for: in doc.go, which carries its decisions, too. Not those of generated
// code and of tests alone, and programs, which say in main.go how they are called.
func TestDoc(t *testing.T) {
	for _, p := range list(t) {
		if p.Name == "main" || len(p.GoFiles) == 0 || strings.Contains(p.ImportPath, "/admin/pb/") {
			continue
		}
		b, err := os.ReadFile(filepath.Join(p.Dir, "doc.go"))
		if err != nil || !strings.Contains("\n"+string(b), "\n// Package "+p.Name+" ") {
			t.Errorf("%s has no doc.go that says what it is for (%v)", p.ImportPath, err)
		}
	}
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Dir,GoFiles,Imports", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			t.Fatalf("go list: %v\n%s", err, ee.Stderr)
		}
		t.Fatal(err)
	}
	var all []pkg
	d := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}
