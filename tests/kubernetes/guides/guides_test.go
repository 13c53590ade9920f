// Package guides reads what `trousseau encryption-config` prints for a distribution, and the manifest of the static pod,
// with the types of those who will read them.
package guides

import (
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/apis/apiserver/install"
	"k8s.io/apiserver/pkg/apis/apiserver/validation"
	kubeadm "k8s.io/kubernetes/cmd/kubeadm/app/apis/kubeadm/v1beta4"
	"sigs.k8s.io/yaml"

	"trousseau/tests/kubernetes/internal/harness"
)

const (
	packaging = "../../../packaging/"
	directory = "/run/trousseau"
	flag      = "encryption-provider-config"
)

// rancher is what concerns us of the configuration files of k3s and RKE2.
type rancher struct {
	Args   []string `json:"kube-apiserver-arg"`
	Mounts []string `json:"kube-apiserver-extra-mount"`
}

// rke is what concerns us of a cluster.yml.
type rke struct {
	Services struct {
		KubeAPI struct {
			ExtraArgs  map[string]string `json:"extra_args"`
			ExtraBinds []string          `json:"extra_binds"`
		} `json:"kube-api"`
	} `json:"services"`
}

// wiring is where the API server is told to look, and what of the host it sees.
type wiring struct {
	file   string
	mounts []string
}

func TestEncryptionConfig(t *testing.T) {
	for name, read := range map[string]func(*testing.T, []byte) wiring{
		"kubeadm": func(t *testing.T, fragment []byte) (w wiring) {
			var config kubeadm.ClusterConfiguration
			strictly(t, fragment, &config)
			for _, arg := range config.APIServer.ExtraArgs {
				if arg.Name == flag {
					w.file = arg.Value
				}
			}
			for _, volume := range config.APIServer.ExtraVolumes {
				if volume.HostPath != volume.MountPath || volume.PathType != corev1.HostPathDirectory {
					t.Errorf("%+v", volume)
				}
				w.mounts = append(w.mounts, volume.MountPath)
			}
			return w
		},
		"rke2": readRancher,
		"k3s": func(t *testing.T, fragment []byte) wiring {
			w := readRancher(t, fragment)
			if w.mounts != nil {
				t.Errorf("k3s has no container to mount anything into: %v", w.mounts)
			}
			w.mounts = []string{"/"} // a process of the host
			return w
		},
		"rke": func(t *testing.T, fragment []byte) wiring {
			var config rke
			strictly(t, fragment, &config)
			// RKE itself mounts that directory.
			return wiring{config.Services.KubeAPI.ExtraArgs[flag], append(bound(t, config.Services.KubeAPI.ExtraBinds), "/etc/kubernetes")}
		},
	} {
		t.Run(name, func(t *testing.T) {
			printed := printFor(t, name)
			validate(t, printed)
			wired := read(t, fragmentOf(printed))
			saved := regexp.MustCompile(`trousseau encryption-config … >(\S+?)\)`).FindSubmatch(printed)
			if saved == nil || string(saved[1]) != wired.file {
				t.Errorf("the file is saved as %q and looked for at %q", saved, wired.file)
			}
			for _, needed := range []string{wired.file, directory} {
				if !slices.ContainsFunc(wired.mounts, func(mount string) bool {
					return mount == "/" || needed == mount || strings.HasPrefix(needed, mount+"/")
				}) {
					t.Errorf("%s is not mounted: %v", needed, wired.mounts)
				}
			}
			if name == "rke" {
				return // an older way, without a guide
			}
			guide, err := os.ReadFile(packaging + "guides/" + name + ".md")
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(guide), "encryption-config --for "+name+" >"+wired.file) {
				t.Errorf("the guide does not write to %s", wired.file)
			}
		})
	}
}

func readRancher(t *testing.T, fragment []byte) wiring {
	var config rancher
	strictly(t, fragment, &config)
	if len(config.Args) != 1 {
		t.Fatalf("%v", config.Args)
	}
	file, found := strings.CutPrefix(config.Args[0], flag+"=")
	if !found {
		t.Errorf("%v", config.Args)
	}
	return wiring{file, bound(t, config.Mounts)}
}

// bound says where mounts of the form host:container[:ro] lie, which must be the same on both sides.
func bound(t *testing.T, mounts []string) (places []string) {
	for _, mount := range mounts {
		sides := strings.Split(mount, ":")
		if len(sides) < 2 || sides[0] != sides[1] {
			t.Errorf("%s is elsewhere inside", mount)
		}
		places = append(places, sides[0])
	}
	return places
}

func printFor(t *testing.T, distribution string) []byte {
	binary := harness.Program(t, os.Getenv("TROUSSEAU_BIN"), "build it with `cargo build`, and set TROUSSEAU_BIN")
	printed, err := exec.Command(binary, "encryption-config", "--for", distribution).Output()
	if err != nil {
		t.Fatal(err)
	}
	return printed
}

// validate reads it as the API server does, unknown fields refused.
func validate(t *testing.T, printed []byte) {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	codecs := serializer.NewCodecFactory(scheme, serializer.EnableStrict)
	object, _, err := codecs.UniversalDecoder().Decode(printed, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	config := object.(*apiserver.EncryptionConfiguration)
	if errors := validation.ValidateEncryptionConfiguration(config, false); len(errors) > 0 {
		t.Error(errors.ToAggregate())
	}
	kms := config.Resources[0].Providers[0].KMS
	if kms == nil || kms.APIVersion != "v2" || kms.Endpoint != "unix://"+path.Join(directory, "kms.sock") {
		t.Errorf("%+v", kms)
	}
}

// fragmentOf is what the steps say to put elsewhere: the lines that are indented within comments.
func fragmentOf(printed []byte) []byte {
	var fragment []string
	for line := range strings.Lines(string(printed)) {
		if inner, found := strings.CutPrefix(line, "#      "); found {
			fragment = append(fragment, inner)
		}
	}
	return []byte(strings.Join(fragment, ""))
}

func strictly(t *testing.T, text []byte, into any) {
	if err := yaml.UnmarshalStrict(text, into); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
}

func TestStaticPod(t *testing.T) {
	text, err := os.ReadFile(packaging + "static-pod/trousseau.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	strictly(t, text, &pod)
	spec, container := pod.Spec, pod.Spec.Containers[0]
	// What kubelet and the API server refuse a static pod, or what would need an API server.
	if spec.ServiceAccountName != "" || len(spec.ImagePullSecrets) > 0 || *spec.AutomountServiceAccountToken || len(container.EnvFrom) > 0 {
		t.Error("it refers to what only the API server has")
	}
	if !spec.HostNetwork || spec.PriorityClassName != "system-node-critical" || container.ImagePullPolicy != corev1.PullNever {
		t.Error("it would wait for the network, a registry, or room")
	}
	places := map[string]string{}
	for _, volume := range spec.Volumes {
		if volume.HostPath == nil {
			t.Fatalf("%s is not the host's", volume.Name)
		}
		places[volume.Name] = volume.HostPath.Path
	}
	for _, mount := range container.VolumeMounts {
		if places[mount.Name] != mount.MountPath {
			t.Errorf("%s is %s outside and %s inside", mount.Name, places[mount.Name], mount.MountPath)
		}
		delete(places, mount.Name)
	}
	if len(places) > 0 || len(container.VolumeMounts) != 3 {
		t.Errorf("not mounted: %v", places)
	}
	security := container.SecurityContext
	if *security.AllowPrivilegeEscalation || !*security.ReadOnlyRootFilesystem || !slices.Equal(security.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Errorf("%+v", security)
	}
}
