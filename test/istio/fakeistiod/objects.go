package fakeistiod

import (
	"fmt"
	"slices"
	"strings"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clienttesting "k8s.io/client-go/testing"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	kubelib "istio.io/istio/pkg/kube"
	"istio.io/istio/pkg/kube/controllers"
	"istio.io/istio/pkg/kube/kclient/clienttest"
	"istio.io/istio/security/pkg/k8s/tokenreview"
)

// bound is what a token says: a service account and the pod that the token was made for.
type bound struct {
	namespace, account, pod string
	uid                     types.UID
	audience                string
}

// Apply creates or replaces the objects of a YAML text (documents separated by ---), in the API server and so in the
// istiod that runs. A namespace, node, pod, service, AuthorizationPolicy, PeerAuthentication, ServiceEntry or
// WorkloadEntry is taken.
func (c *Cluster) Apply(yaml string) {
	c.tb.Helper()
	for _, doc := range strings.Split(yaml, "\n---\n") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		obj, _, err := kubelib.IstioCodec.UniversalDeserializer().Decode([]byte(doc), nil, nil)
		if err != nil {
			c.tb.Fatalf("fakeistiod: %v in\n%s", err, doc)
		}
		c.Put(obj)
	}
}

// Put is Apply for an object.
func (c *Cluster) Put(obj runtime.Object) {
	c.tb.Helper()
	switch o := obj.(type) {
	case *corev1.Namespace:
		put(c, o)
	case *corev1.Node:
		put(c, o)
	case *corev1.Pod:
		put(c, o)
	case *corev1.Service:
		put(c, o)
	case *securityv1.AuthorizationPolicy:
		put(c, o)
	case *securityv1.PeerAuthentication:
		put(c, o)
	case *networkingv1.ServiceEntry:
		put(c, o)
	case *networkingv1.WorkloadEntry:
		put(c, o)
	default:
		c.tb.Fatalf("fakeistiod: no place for a %T", obj)
	}
}

func put[T controllers.ComparableObject](c *Cluster, obj T) {
	c.tb.Helper()
	c.change.Lock()
	defer c.change.Unlock()
	c.keep(obj)
	if c.running != nil {
		clienttest.NewWriter[T](c.tb, c.running.Server.KubeClient()).CreateOrUpdate(obj)
	}
}

// keep puts the object into the cluster; its uid is that of its predecessor, or a new one.
func (c *Cluster) keep(obj controllers.Object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := key(obj, obj.GetNamespace(), obj.GetName())
	if old, ok := c.objects[k].(controllers.Object); ok {
		obj.SetUID(old.GetUID())
	} else {
		c.uids++
		obj.SetUID(types.UID(fmt.Sprintf("uid-%d", c.uids)))
		c.order = append(c.order, k)
	}
	c.objects[k] = obj.DeepCopyObject()
}

// all are the objects in the order in which they came.
func (c *Cluster) all() []runtime.Object {
	c.mu.Lock()
	defer c.mu.Unlock()
	objects := make([]runtime.Object, 0, len(c.order))
	for _, k := range c.order {
		objects = append(objects, c.objects[k].DeepCopyObject())
	}
	return objects
}

// Delete removes an object from the API server. zero names the kind: Delete(c, &corev1.Pod{}, "default", "a").
func Delete[T controllers.ComparableObject](c *Cluster, zero T, namespace, name string) {
	c.tb.Helper()
	c.change.Lock()
	defer c.change.Unlock()
	k := key(zero, namespace, name)
	c.mu.Lock()
	_, exists := c.objects[k]
	delete(c.objects, k)
	c.order = slices.DeleteFunc(c.order, func(o string) bool { return o == k })
	c.mu.Unlock()
	if !exists {
		c.tb.Fatalf("fakeistiod: there is no %s", k)
	}
	if c.running != nil {
		clienttest.NewWriter[T](c.tb, c.running.Server.KubeClient()).Delete(name, namespace)
	}
}

func key(obj runtime.Object, namespace, name string) string {
	return fmt.Sprintf("%T %s/%s", obj, namespace, name)
}

// Token is what the kubelet would put into the volume of a pod that exists: bound to the pod, for istiod's audience.
func (c *Cluster) Token(namespace, account, pod string) string {
	return c.token(bound{namespace: namespace, account: account, pod: pod, audience: "istio-ca"})
}

// TokenFor is Token with another audience, and without a pod if that is empty.
func (c *Cluster) TokenFor(audience, namespace, account, pod string) string {
	return c.token(bound{namespace: namespace, account: account, pod: pod, audience: audience})
}

func (c *Cluster) token(b bound) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b.pod != "" {
		pod, ok := c.objects[key(&corev1.Pod{}, b.namespace, b.pod)].(*corev1.Pod)
		if !ok {
			c.tb.Fatalf("fakeistiod: no pod %s/%s to bind a token to", b.namespace, b.pod)
		}
		b.uid = pod.UID
	}
	t := fmt.Sprintf("token-%d.%s.%s", len(c.tokens), b.namespace, b.account)
	c.tokens[t] = b
	return t
}

// review answers a TokenReview as the API server does: a token is good for its audiences and as long as its pod exists.
func (c *Cluster) review(action clienttesting.Action) (bool, runtime.Object, error) {
	r := action.(clienttesting.CreateAction).GetObject().(*authv1.TokenReview).DeepCopy()
	c.mu.Lock()
	defer c.mu.Unlock()
	b, known := c.tokens[r.Spec.Token]
	switch {
	case !known:
		r.Status.Error = "invalid bearer token"
	case !slices.Contains(r.Spec.Audiences, b.audience):
		r.Status.Error = fmt.Sprintf("token audiences [%q] is invalid for the target audiences %q", b.audience,
			r.Spec.Audiences)
	default:
		if b.pod != "" {
			pod, _ := c.objects[key(&corev1.Pod{}, b.namespace, b.pod)].(*corev1.Pod)
			if pod == nil || pod.UID != b.uid {
				r.Status.Error = "service account token has been invalidated"
				return true, r, nil
			}
		}
		r.Status.Authenticated = true
		r.Status.User.Username = fmt.Sprintf("system:serviceaccount:%s:%s", b.namespace, b.account)
		r.Status.User.Groups = []string{"system:serviceaccounts", "system:serviceaccounts:" + b.namespace,
			"system:authenticated"}
		r.Status.User.Extra = map[string]authv1.ExtraValue{}
		if b.pod != "" {
			r.Status.User.Extra[tokenreview.PodNameKey] = authv1.ExtraValue{b.pod}
			r.Status.User.Extra[tokenreview.PodUIDKey] = authv1.ExtraValue{string(b.uid)}
		}
	}
	return true, r, nil
}
