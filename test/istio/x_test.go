package istio
import (
 _ "istio.io/istio/pkg/hbone"
 _ "ztun/test/interop/rig"
 _ "golang.org/x/net/http2"
)
