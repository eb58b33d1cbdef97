package agentcmd

import (
	"reflect"
	"testing"

	"github.com/spf13/cobra"
)

// What `ztun agent` hands on is understood by ztun-agent as it was meant.
func TestArguments(t *testing.T) {
	for _, name := range []string{"NODE_NAME", "INPOD_UDS", "POD_NAMESPACE", "RUST_LOG", "LOG_FORMAT"} {
		t.Setenv(name, "")
	}
	parse := func(args []string) (o Options, handed []string) {
		t.Helper()
		cmd := Command("agent", cobra.NoArgs, func(cmd *cobra.Command, got Options) error {
			o, handed = got, Arguments(cmd.Flags())
			return nil
		})
		cmd.SetArgs(args)
		if err := cmd.Execute(); err != nil {
			t.Fatal(args, err)
		}
		return o, handed
	}
	for _, args := range [][]string{nil, {"--node", "a b", "--exclude-namespaces", "x,y", "--plugin-socket="},
		{"--exclude-namespaces=", "--listen", "", "--log", "debug,kubernetes=warn"}} {
		o, handed := parse(args)
		if again, _ := parse(handed); !reflect.DeepEqual(o, again) {
			t.Errorf("%q, handed on as %q: %+v, want %+v", args, handed, again, o)
		}
		if len(args) == 0 && len(handed) > 0 {
			t.Errorf("handed on: %q", handed)
		}
	}
	t.Setenv("NODE_NAME", "n7")
	t.Setenv("INPOD_UDS", "/s")
	if o, _ := parse(nil); o.Node != "n7" || o.ZDSSocket != "/s" || o.MeshNamespace != "istio-system" {
		t.Errorf("%+v", o)
	}
}
